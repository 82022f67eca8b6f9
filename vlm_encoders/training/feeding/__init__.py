"""Data as the loop draws it: sources, samples, orders, batches, and their checks."""
