"""Prompts from the command line, standard input and files."""

import io
import json
import math
import sys

import pytest

from moe_jax.errors import UserError
from moe_jax.terminal.prompts import read_prompts


def test_nothing_is_one_empty_prompt_and_a_text_is_itself():
    assert read_prompts(None, None) == {"": ""}
    assert read_prompts("ROMEO:\n", None) == {"": "ROMEO:\n"}
    assert read_prompts("\ufeffROMEO:", None) == {"": "ROMEO:"}


@pytest.mark.parametrize(
    ("content", "prompt"),
    [("To be", "To be"), ("\ufeffTo be\n", "To be"), ("To be\r\n", "To be"), ("a\n\n", "a\n"), ("", "")],
)
def test_a_text_file_and_standard_input_are_one_prompt_without_its_last_line_end(
    tmp_path, monkeypatch, content, prompt
):
    (tmp_path / "prompt.txt").write_bytes(content.encode())
    assert read_prompts(None, str(tmp_path / "prompt.txt")) == {"": prompt}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert read_prompts("-", None) == {"": prompt}


def test_json_lines_are_a_prompt_each(tmp_path):
    prompts = ["ROMEO:", "a\nb", "", "é"]
    lines = [json.dumps({"prompt": prompt, "logprobs": [math.nan]}) for prompt in prompts]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\ufeff" + "\n\n".join(lines))
    places = [f"{file}:{number}" for number in (1, 3, 5, 7)]
    assert read_prompts(None, str(file)) == dict(zip(places, prompts, strict=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "a"}\n{"prompt"', r'jsonl:2 must be a JSON object with a text as "prompt" \(Expecting'),
        (b'{"text": "a"}', r"prompts.jsonl:1 must be a JSON .*missing required field `prompt`\); correct the line"),
        (b'{"prompt": 5}', r"must be a JSON object with a text .*Expected `str`, got `int`"),
        (b'["a"]', r"must be a JSON object with a text .*Expected `object`, got `array`"),
        (b'{"prompt": "\\ud800"}', r"prompts.jsonl:1 must be a JSON object with a text"),
        (b"\xff", r"--prompt-file .*prompts.jsonl must be UTF-8 text, got another byte at 0"),
        (b"\n \n", r"has no prompts in it"),
        (b"[" * 100_000, r"prompts.jsonl:1 must be a JSON object"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_line(tmp_path, content, words):
    (tmp_path / "prompts.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_prompts(None, str(tmp_path / "prompts.jsonl"))
