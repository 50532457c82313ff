"""The two commands as a user runs them: a run that is interrupted, goes on and is sampled from."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import threading

import pytest

from tests.compiling import quick_environment
from tests.tiny import CONFIG, ROOT, change, command, make_home, start, steps_of, train

ENDLESS = {"num_steps": 100000, "eval_every": 100000, "checkpoint_every": 100000}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text, a recipe and an empty cache; where the commands are run."""
    return make_home(tmp_path_factory.mktemp("home"), change(CONFIG, train=ENDLESS))


@pytest.fixture(scope="module")
def run(home):
    """A run that Ctrl-C interrupted as it began to step, and that then went on to its end: (folder, both outputs)."""
    workdir, first = home / "runs" / "tiny", ""
    arguments = ("train.py", "--config", home / "tiny.py", "--workdir", workdir)
    with start(home, *arguments, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            first += line
            if line.startswith("first step"):
                process.send_signal(signal.SIGINT)
        assert process.wait() == 130, first
    (saved,) = re.findall(r"interrupted: the checkpoint of step (\d+) is on disk", first)
    second = train(home, workdir, "--train.num-steps", int(saved) + 20)
    assert (second.returncode, second.stderr) == (0, "")
    return workdir, first, second.stdout


def test_an_interrupted_run_goes_on_with_the_same_command(run):
    workdir, first, second = run
    saved = int(re.findall(r"checkpoint of step (\d+)", first)[0])
    assert "run the same command to go on" in first
    assert "WARNING" not in first + second
    assert f"going on from step {saved}\n" in second
    assert f"step {saved + 20}: train" in second
    assert f"sample from it: python sample.py --workdir {workdir}" in second
    assert steps_of(workdir)[-1] == saved + 20


PAST_CONTEXT = "note: past the context of 16 tokens the oldest tokens left the cache one by one (rotary positions)\n"


def test_sampling_from_nothing_finds_the_last_run(home, run):
    result = command(home, "sample.py", "--num-samples", 4)
    assert result.returncode == 0
    assert result.stderr == "note: sampling from runs/tiny, the run that changed last\n" + PAST_CONTEXT
    assert result.stdout.count("---") == 3
    assert len(result.stdout) > 40
    assert (run[0] / "generated_text.txt").read_text() == result.stdout


def test_sampling_from_a_prompt(home, run):
    flags = ("--workdir", run[0], "--num-samples", 2, "--temperature", 0.5, "--seed", 3)
    given = command(home, "sample.py", *flags, "--prompt", "the quick")
    assert (given.returncode, given.stderr) == (0, PAST_CONTEXT)
    assert given.stdout.count("the quick") >= 2


@pytest.mark.slow
def test_from_python_and_in_a_conversation_the_text_is_that_of_the_command(home, run):
    flags = ("--workdir", run[0], "--max-new-tokens", 100, "--seed", 0)
    printed = command(home, "sample.py", *flags, "--prompt", "-", stdin="ROMEO:").stdout
    (snippet,) = re.findall(
        r"```python\n(from moe_jax import load\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    python = command(home, "-c", snippet.replace("runs/moe", str(run[0])))
    unknown = "':', 'E', 'M', 'O', 'R'"
    told = f"this model's tokenizer does not know {unknown} of the prompt and reads an unknown token\n"
    assert python.stdout == printed
    assert f"UserWarning: {told}" in python.stderr
    conversation = command(home, "sample.py", *flags, "--interactive", stdin="The quick brown fox\nROMEO:\nexit\nno\n")
    assert "ROMEO:" + conversation.stdout == printed
    refused = "error: the prompt must fit the context of 16 tokens, got 19; shorten the prompt\n"
    assert conversation.stderr == refused + "note: " + told
    assert conversation.returncode == 0
    assert (run[0] / "generated_text.txt").read_text() == printed


def test_json_lines_in_and_out(home, run):
    prompts = ["the quick", "", "fox"]
    (home / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    flags = ("--workdir", run[0], "--num-samples", 2, "--prompt-file", "prompts.jsonl", "--jsonl", "--seed", 3)
    result = command(home, "sample.py", *flags)
    assert (result.returncode, result.stderr) == (0, PAST_CONTEXT)
    texts = [json.loads(line) for line in result.stdout.splitlines()]
    assert [text["prompt"] for text in texts] == [prompt for prompt in prompts for _ in range(2)]
    for text in texts:
        assert set(text) == {"prompt", "text", "tokens", "logprobs", "finish_reason", "timing"}
        assert len(text["tokens"]) == len(text["logprobs"]) <= 20
        assert all(logprob <= 0 for logprob in text["logprobs"])
    (plain,) = {(run[0] / "generated_text.txt").read_text()}
    assert plain.count("---") == 5


def read_until(terminal, end):
    """What a program prints on ``terminal`` until ``end`` stands at the end of it."""
    shown = ""
    while not shown.endswith(end):
        assert has_output(terminal, 120), f"nothing more after {shown!r}"
        shown += os.read(terminal, 1024).decode()
    return shown


def has_output(terminal, seconds):
    return bool(select.select([terminal], [], [], seconds)[0])


def press_ctrl_c(process, has_worked):
    """Presses it as a person does: Python's line editor misses what comes just before it waits for keys."""
    for _ in range(60):
        process.send_signal(signal.SIGINT)
        if has_worked():
            return
    raise AssertionError("Ctrl-C does nothing")


def has_ended(process, seconds):
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_a_conversation_on_a_terminal(home, run):
    ours, theirs = pty.openpty()
    flags = ("--workdir", run[0], "--interactive", "--temperature", "0", "--max-new-tokens", "9")
    terminal = {"stdin": theirs, "stdout": theirs, "env": quick_environment(home / "cache") | {"TERM": "dumb"}}
    with start(home, "sample.py", *flags, **terminal) as process:
        os.close(theirs)
        end = threading.Timer(60, process.kill)  # whatever goes wrong, this test ends
        end.start()
        assert read_until(ours, "> ") == "> "
        os.write(ours, b"the quick\n")
        first = read_until(ours, "\r\n\r\n> ")
        # The same line from the history, where the arrow up finds it.
        os.write(ours, b"\x1b[A\n")
        assert read_until(ours, "\r\n\r\n> ").split("\r\n")[1:] == first.split("\r\n")[1:]
        # What is typed is dropped by Ctrl-C; with nothing typed it leaves.
        os.write(ours, b"brown")
        read_until(ours, "brown")
        press_ctrl_c(process, lambda: has_output(ours, 2))
        read_until(ours, "> ")
        press_ctrl_c(process, lambda: has_ended(process, 10))
        end.cancel()
        assert process.returncode == 0
    os.close(ours)


@pytest.mark.slow
@pytest.mark.parametrize("screen", [os.pipe, pty.openpty])
def test_a_reader_or_a_terminal_that_goes_away_does_not_end_the_training(home, screen):
    ours, theirs = screen()
    workdir = home / f"gone_{screen.__name__}"
    flags = ("--workdir", workdir, "--train.num-steps", 30, "--train.log-every", 1)
    with start(home, "train.py", "--config", "tiny.py", *flags, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        os.read(ours, 1)
        os.close(ours)
        assert process.wait() == 0
    assert "step 30: train" in (workdir / "train.log").read_text()
    assert (workdir / "loss_curve.png").exists()
