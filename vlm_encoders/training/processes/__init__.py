"""One process or many: how weights are shared, gathered, and kept from waiting for each other."""
