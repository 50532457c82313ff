"""Checkpoints: saved beside the training, sealed, restored."""
