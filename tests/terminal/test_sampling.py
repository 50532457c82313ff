"""A conversation line by line, through a pipe; tests/end_to_end/test_commands.py has one on a terminal."""

import dataclasses
import io
import json
import signal
import sys
import types

import jax
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.config import SampleConfig
from moe_jax.model.decoder import Tokens, forward
from moe_jax.sampling import engine as sampling_engine
from moe_jax.sampling.text import Text
from moe_jax.terminal import sampling as terminal
from tests.sampling.tiny import CONFIG, TOKENIZER, make

SETTINGS = SampleConfig(max_new_tokens=12, temperature=1.0, seed=1)


@pytest.fixture
def converse(tmp_path, monkeypatch, capsys):
    """A function: (made, bytes of standard input) to (standard output, standard error, generated_text.txt)."""

    def run(made, lines):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        terminal.converse(*made[:2], SETTINGS, tmp_path / "generated_text.txt")
        printed = capsys.readouterr()
        return printed.out, printed.err, (tmp_path / "generated_text.txt").read_text()

    return run


def text_of(made, prompt):
    return made.generate(prompt, SETTINGS)[0].text


def test_each_line_is_continued_and_nothing_else_printed(rotary, converse):
    # An empty line is continued from nothing; a file may come from Windows, and need not end its last line.
    out, err, written = converse(rotary, b"ab\n\r\nhgf")
    assert out == "".join(text_of(rotary, prompt) + "\n" for prompt in ("ab", "", "hgf"))
    assert err == ""
    assert written == "hgf" + text_of(rotary, "hgf") + "\n"


def test_settings_are_changed_between_lines(rotary, converse):
    lines = b"/temperature 0\nab\n/top-k 3\n/seed\n/temperature 2\n//a\n"
    out, err, written = converse(rotary, lines)
    greedy = dataclasses.replace(SETTINGS, temperature=0)
    hot = dataclasses.replace(SETTINGS, temperature=2, top_k=3)
    first = rotary.generate("ab", greedy)[0].text
    assert out == first + "\n" + rotary.generate("/a", hot)[0].text + "\n"
    unknown = "note: this model's tokenizer does not know '/' of the prompt and reads an unknown token\n"
    assert err == "/temperature is 0\n/top-k is 3\n/seed is 1\n/temperature is 2\n" + unknown
    assert written.startswith("/a")


def test_a_setting_that_cannot_be_is_reported_and_changes_nothing(rotary, converse):
    lines = b"/temprature 2\n/temperature hot\n/top-p 7\n/top-k none\n/max-new-tokens 1.5\n/stop x\nab\n"
    out, err, _ = converse(rotary, lines)
    assert out == text_of(rotary, "ab") + "\n"
    assert err.splitlines() == [
        "error: there is no setting /temprature; did you mean /temperature?",
        "error: /temperature must be of type float, got 'hot' of type str",
        "error: /top-p must be in [0.0, 1.0], got 7",
        "/top-k is None",
        "error: /max-new-tokens must be of type int, got 1.5 of type float",
        "error: /stop cannot be changed in a conversation; leave it, and begin another with --stop",
    ]


def test_a_prompt_that_cannot_be_used_is_reported_and_exit_leaves(rotary, converse):
    out, err, _ = converse(rotary, b"a" * 17 + b"\n\xff\nab\nexit\nhgf\n")
    assert out == text_of(rotary, "ab") + "\n"
    assert err == (
        "error: the prompt must fit the context of 16 tokens, got 17; shorten the prompt\n"
        "error: the prompt must be UTF-8 text, got another byte at 0; give text\n"
    )


class Interrupted:
    """A engine whose user presses Ctrl-C while the second piece is made."""

    config = CONFIG

    def unknown_in(self, texts):
        return None

    def begin(self, prompt, sample):
        return Text(TOKENIZER, TOKENIZER.encode(prompt).tolist(), sample, 0, -1, prompt)

    def stream(self, variables, text, keep_experts):
        yield "one "
        if len(text.prompt_ids) == 4:
            signal.raise_signal(signal.SIGINT)
        yield "two "
        yield "three"


def test_ctrl_c_ends_the_text_and_not_the_conversation(converse):
    before = signal.getsignal(signal.SIGINT)
    out, err, written = converse((Interrupted(), None), b"abcd\nabc\n")
    assert out == "one two \none two three\n"
    assert (err, written) == ("", "abcone two three\n")
    assert signal.getsignal(signal.SIGINT) is before


class TwoRows:
    """A batch of two whose texts get three letters a turn; its user presses Ctrl-C while the second turn is made."""

    def __init__(self, programs, variables, sizes):
        self.texts, self.turns = [], 0

    @property
    def num_free(self):
        return 2 - len(self.texts)

    def admit(self, texts):
        self.texts += texts

    def advance(self):
        drawn = types.SimpleNamespace(
            tokens_BS=np.full((2, 3), TOKENIZER.encode("a")[0]),
            logprobs_BS=np.zeros((2, 3)),
            top_tokens_BSK=np.zeros((2, 3, 0)),
            chosen_BSNE=None,
        )
        for row, text in enumerate(self.texts):
            text.add(drawn, row, 3)
        self.texts = [text for text in self.texts if text.finish_reason is None]
        self.turns += 1
        if self.turns == 2:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("is_json", [False, True])
def test_a_signal_among_many_prompts_loses_no_text(rotary, tmp_path, monkeypatch, capsys, is_json):
    monkeypatch.setattr(sampling_engine, "Batch", TwoRows)
    texts = [rotary.engine.begin(prompt, SETTINGS) for prompt in ("b", "c", "d", "e")]
    texts[0].sample = dataclasses.replace(SETTINGS, max_new_tokens=2)
    monkeypatch.setattr(rotary.engine, "begin_all", lambda prompts, sample, places: texts)
    file = tmp_path / "generated_text.txt"
    with pytest.raises(errors.Interrupted) as caught:
        terminal.print_samples(*rotary[:2], {}, SETTINGS, file, load_seconds=1.0 if is_json else None)
    assert caught.value.exit_code == 130
    assert file.read_text() == "baa\n\n---\n\ncaaaaaa\n\n---\n\ndaaa\n"
    out, err = capsys.readouterr()
    if is_json:
        lines = [json.loads(line) for line in out.splitlines()]
        assert [line["text"] for line in lines] == ["aa", "aaaaaa", "aaa"]
        assert [line["finish_reason"] for line in lines] == ["length", "interrupted", "interrupted"]
    else:
        assert out == file.read_text()
    assert err == "interrupted: 1 of 4 texts are whole, 2 end where they were stopped, 1 were not begun\n"


def test_an_error_about_one_prompt_of_many_names_its_line(rotary, tmp_path):
    prompts = {"p.jsonl:1": "a", "p.jsonl:3": "a" * 17}
    with pytest.raises(errors.UserError, match=r"^p\.jsonl:3: the prompt must fit the context of 16 tokens, got 17"):
        terminal.print_samples(*rotary[:2], prompts, SETTINGS, tmp_path / "generated_text.txt")
    wrong = dataclasses.replace(SETTINGS, stop_tokens=(999,))
    with pytest.raises(errors.UserError, match=r"^each of stop_tokens must be"):
        terminal.print_samples(*rotary[:2], prompts, wrong, tmp_path / "generated_text.txt")


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ("rotary", "the oldest tokens left the cache one by one (rotary positions)"),
        ("learned", "the text was cut to its last half and read anew whenever it was full (learned positions)"),
    ],
)
def test_what_happens_past_the_context_is_reported_once(rotary, converse, positions, words):
    made = rotary if positions == "rotary" else make(dataclasses.replace(CONFIG, positions=positions))
    _, err, _ = converse(made, b"/max-new-tokens 40\n/seed 3\n" + b"hgfedcbahgfedcba\n" * 2)
    assert err.splitlines()[2:] == [f"note: past the context of 16 tokens {words}"]


def test_experts_of_the_last_answer(rotary, converse):
    out, err, _ = converse(rotary, b"/experts\nabc\n/experts\n")
    assert err == "error: /experts shows the experts of the last answer, and there is none yet; give a prompt first\n"
    (sample,) = rotary.generate("abc", SETTINGS)
    text, header, *lines = out.splitlines()
    assert text == sample.text
    assert header.strip() == "experts, a column for each MoE layer"
    ids = [*TOKENIZER.encode("abc").tolist(), *sample.tokens]
    run = jax.jit(lambda mask_BL: forward(rotary.decoder, rotary.variables, Tokens(np.array([ids]), mask_BL)))

    def load(size):
        """The oracle: rows that a full forward of so many tokens sends to each layer's experts."""
        return np.asarray(run(np.arange(len(ids))[None] < size).statistics.router.load_E)[:, 0]

    for index, line in enumerate(lines):
        chosen = ["+".join(map(str, np.flatnonzero(layer_E))) for layer_E in load(4 + index) - load(3 + index)]
        name = json.dumps(TOKENIZER.decode(sample.tokens[index : index + 1]), ensure_ascii=False)
        assert line.split() == [name, *chosen]
    assert len(lines) == len(sample.tokens) >= 5


def test_a_token_that_begins_a_window_shows_no_experts(converse):
    made = make(dataclasses.replace(CONFIG, positions="learned"), end_token=-1)
    out, _, _ = converse(made, b"/max-new-tokens 30\nabc\n/experts\n")
    # 13 tokens fill the window, and the one after has no place; then 8 more fill it again, and so on.
    lines = [line.split() for line in out.splitlines()[2:]]
    assert len(lines) == 30
    assert [index for index, line in enumerate(lines) if line[-1] == "-"] == [13, 22]
