"""Naive references: slow, obvious, and written before the fast thing."""
