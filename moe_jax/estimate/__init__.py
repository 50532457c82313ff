"""What a training step needs of each device and how long it takes at least, before anything runs."""
