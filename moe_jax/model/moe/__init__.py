"""The sparse layer: a router makes a plan, a dispatcher carries it out, experts do the work; layer.py joins them."""
