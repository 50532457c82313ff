"""Texts whose entropy is known."""

VERSE = "the quick brown fox jumps over the lazy dog; "
