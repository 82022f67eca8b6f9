"""Encoder tables and the adapters to the libraries behind them."""
