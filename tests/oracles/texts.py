"""Texts whose entropy is known, and files of texts."""

import json

VERSE = "the quick brown fox jumps over the lazy dog; "


def json_lines(texts):
    """The content of a .jsonl file of ``texts``."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)
