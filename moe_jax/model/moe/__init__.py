"""The sparse layer: a router makes a plan, a backend carries it out through the experts; layer.py joins them."""
