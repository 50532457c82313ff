"""What a run directory is: its files, checkpoints, metrics and log."""
