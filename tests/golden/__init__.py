"""Outputs of other implementations, kept as data, and the scripts that made them."""
