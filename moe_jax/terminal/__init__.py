"""What sample.py does on a terminal."""
