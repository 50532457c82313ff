"""A conversation line by line, through a pipe; tests/test_commands.py has one on a terminal."""

import dataclasses
import io
import signal
import sys

import pytest

from moe_jax.config import Config, SampleConfig, TrainConfig
from moe_jax.runs.layout import RunDirectory
from moe_jax.sampling import front_end
from tests.sampling.tiny import CONFIG

SETTINGS = SampleConfig(max_new_tokens=12, temperature=1.0, seed=1)


@pytest.fixture
def converse(tmp_path, monkeypatch, capsys):
    """A function: (made, bytes of standard input) to (standard output, standard error, generated_text.txt)."""

    def run(made, lines):
        directory = RunDirectory(tmp_path)
        directory.save_config(Config(train=TrainConfig(compile_cache=False)))
        monkeypatch.setattr(front_end, "load_generator", lambda run, which: made[:2])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        front_end.converse(directory, "best", SETTINGS)
        printed = capsys.readouterr()
        return printed.out, printed.err, directory.generated_text.read_text()

    return run


def text_of(made, prompt):
    generator, variables, _ = made
    return generator.generate(variables, prompt, SETTINGS)[0].text


def test_each_line_is_continued_and_nothing_else_printed(rotary, converse):
    # An empty line is continued from nothing; a file may come from Windows, and need not end its last line.
    out, err, written = converse(rotary, b"ab\n\r\nhgf")
    assert out == "".join(text_of(rotary, prompt) + "\n" for prompt in ("ab", "", "hgf"))
    assert err == ""
    assert written == "hgf" + text_of(rotary, "hgf") + "\n"


def test_exit_leaves(rotary, converse):
    assert converse(rotary, b"ab\nexit\nhgf\n")[0] == text_of(rotary, "ab") + "\n"


def test_a_prompt_that_cannot_be_used_is_told_and_the_next_is_asked_for(rotary, converse):
    out, err, _ = converse(rotary, b"a" * 17 + b"\n\xff\nab\n")
    assert out == text_of(rotary, "ab") + "\n"
    assert err == (
        "error: the prompt must fit the context of 16 tokens, got 17; shorten the prompt\n"
        "error: the prompt must be UTF-8 text, got another byte at 0; give text\n"
    )


class Interrupted:
    """A generator whose user presses Ctrl-C while the second piece is made."""

    config = CONFIG

    def stream(self, variables, prompt, sample):
        yield "one "
        if prompt == "long":
            signal.raise_signal(signal.SIGINT)
        yield "two "
        yield "three"


def test_ctrl_c_ends_the_text_and_not_the_conversation(converse):
    before = signal.getsignal(signal.SIGINT)
    out, err, written = converse((Interrupted(), None), b"long\nshort\n")
    assert out == "one two \none two three\n"
    assert (err, written) == ("", "shortone two three\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_learned_positions_are_told_of_once(converse, monkeypatch):
    monkeypatch.setattr(Interrupted, "config", dataclasses.replace(CONFIG, positions="learned"))
    _, err, _ = converse((Interrupted(), None), b"ab\nab\n")
    assert err == "note: learned positions end at the context of 16 tokens, so the text does\n"
