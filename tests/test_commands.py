"""The two commands as a user runs them: a run that is interrupted, goes on and is sampled from; and bad input."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracles.texts import VERSE

ROOT = Path(__file__).parents[1]
RECIPE = """
from moe_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(context_length=16, num_layers=1, embed_dim=16, num_heads=2,
                          moe=MoEConfig(num_experts=4, expert_dim=16)),
        data=DataConfig(path={text!r}, tokenizer="char", batch_size=4),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        train=TrainConfig(num_steps=100000, eval_every=100000, checkpoint_every=100000, log_every=5),
        sample=SampleConfig(max_new_tokens=20),
    )
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text, a recipe and an empty cache; where the commands are run."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "verse.txt").write_text(VERSE * 50)
    (folder / "tiny.py").write_text(RECIPE.format(text=str(folder / "verse.txt")))
    return folder


def environment(home):
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(home / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def command(home, *arguments, stdin=""):
    script, *rest = arguments
    return subprocess.run(
        [sys.executable, ROOT / script, *(item if isinstance(item, bytes) else str(item) for item in rest)],
        cwd=home,
        env=environment(home),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
    )


def train(home, *arguments):
    return command(home, "train.py", "--config", home / "tiny.py", *arguments)


def interrupt_after_the_first_step(home, workdir):
    """Starts a run as a shell does, presses Ctrl-C once it steps, and returns (exit code, output)."""
    with subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--config", home / "tiny.py", "--workdir", workdir],
        cwd=home,
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        output = []
        for line in process.stdout:
            output.append(line)
            if line.startswith("first step"):
                process.send_signal(signal.SIGINT)
        return process.wait(), "".join(output)


@pytest.fixture(scope="module")
def run(home):
    """A run directory that was interrupted by Ctrl-C and then went on to its end: (folder, the two outputs)."""
    workdir = home / "runs" / "tiny"
    code, first = interrupt_after_the_first_step(home, workdir)
    assert code == 130, first
    saved = int(re.findall(r"interrupted: the checkpoint of step (\d+) is on disk", first)[0])
    second = train(home, "--workdir", workdir, "--train.num-steps", saved + 20)
    assert second.returncode == 0, second.stderr
    return workdir, first, second.stdout


def test_an_interrupted_run_goes_on_with_the_same_command(run):
    workdir, first, second = run
    saved = int(re.findall(r"checkpoint of step (\d+)", first)[0])
    assert "run the same command to go on" in first
    assert "WARNING" not in first + second
    assert f"going on from step {saved}\n" in second
    assert f"step {saved + 20}: train" in second
    assert f"sample from it: python sample.py --workdir {workdir}" in second
    assert json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == saved + 20


def test_a_finished_run_says_so(home, run):
    steps = json.loads((run[0] / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    again = train(home, "--workdir", run[0], "--train.num-steps", steps)
    assert (again.returncode, again.stderr) == (0, "")
    assert f"is finished: {steps} steps are done" in again.stdout


def test_sampling_from_nothing_finds_the_last_run(home, run):
    result = command(home, "sample.py", "--num-samples", 4)
    assert result.returncode == 0
    assert result.stderr == "note: sampling from runs/tiny, the run that changed last\n"
    assert result.stdout.count("---") == 3
    assert len(result.stdout) > 40
    assert (run[0] / "generated_text.txt").read_text() == result.stdout


def test_sampling_from_a_prompt_and_from_standard_input(home, run):
    flags = ("--workdir", run[0], "--num-samples", 2, "--temperature", 0.5, "--seed", 3)
    given = command(home, "sample.py", *flags, "--prompt", "The quick")
    assert (given.returncode, given.stderr) == (0, "")
    assert given.stdout.count("The quick") >= 2
    assert command(home, "sample.py", *flags, "--prompt", "-", stdin="The quick").stdout == given.stdout


def test_from_python_and_in_a_conversation_the_text_is_that_of_the_command(home, run):
    flags = ("--workdir", run[0], "--max-new-tokens", 100, "--seed", 0)
    printed = command(home, "sample.py", *flags, "--prompt", "ROMEO:").stdout
    (snippet,) = re.findall(
        r"```python\n(from moe_jax import load\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    python = subprocess.run(
        [sys.executable, "-c", snippet.replace("runs/moe", str(run[0]))],
        env={**environment(home), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (python.stdout, python.stderr) == (printed, "")
    conversation = command(home, "sample.py", *flags, "--interactive", stdin="The quick brown fox\nROMEO:\nexit\nno\n")
    assert "ROMEO:" + conversation.stdout == printed
    assert conversation.stderr == ("error: the prompt must fit the context of 16 tokens, got 19; shorten the prompt\n")
    assert conversation.returncode == 0
    assert (run[0] / "generated_text.txt").read_text() == printed


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
    arguments = ("--workdir", run[0], "--interactive", "--temperature", "0", "--max-new-tokens", "9")
    with subprocess.Popen(
        [sys.executable, ROOT / "sample.py", *arguments],
        cwd=home,
        env=environment(home) | {"TERM": "dumb"},
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(theirs)
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
        press_ctrl_c(process, lambda: has_ended(process, 2))
        assert process.returncode == 0
    os.close(ours)


def files_of(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and "cache" not in file.parts}


def refused(home, result, words, before):
    """The user's mistake: exit code 2, one line on stderr, and no file changed."""
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert words in result.stderr
    assert result.stdout == ""
    assert files_of(home) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "none.py"], "--config none.py does not exist"),
        ([], "--config is required"),
        (["--config", "tiny.py", "--model.moe.top-k", "99"], "model.moe.top_k must be in [1, num_experts=4], got 99"),
        (
            ["--config", "tiny.py", "--workdir", "new", "--model.moe.grouped-matmul", "tokamax"],
            "tokamax needs an NVIDIA GPU, got a cpu",
        ),
        (["--config", "tiny.py", "--data.path", "none.txt"], "data.path=none.txt: the input none.txt does not exist"),
        (["--config", "tiny.py", "--data.path", "empty.txt"], "empty.txt has no text in it"),
        (["--config", "tiny.py", "--data.path", "binary.txt"], "binary.txt is not UTF-8 text"),
        (["--config", "tiny.py", "--workdir", "verse.txt"], "--workdir must be a folder, but verse.txt is a file"),
        (["--config", "tiny.py", "--workdir", "corrupt"], "config.json is corrupt"),
    ],
)
def test_bad_input_to_train(home, arguments, words):
    (home / "empty.txt").write_text("\n \n")
    (home / "binary.txt").write_bytes(bytes(range(256)))
    (home / "corrupt").mkdir(exist_ok=True)
    (home / "corrupt" / "config.json").write_text("{")
    before = files_of(home)
    refused(home, command(home, "train.py", *arguments), words, before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.num-layer", "3"], "--model.num-layers"),
        (["--model.num-layers", "three"], "three"),
        (["--model.norm", "batchnorm"], "rmsnorm"),
    ],
)
def test_a_mistyped_flag_or_value_gets_the_parsers_own_box(home, arguments, words):
    before = files_of(home)
    result = train(home, *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert files_of(home) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir", "none"], "none is not a run directory"),
        (["--workdir", "unfinished"], "there is no checkpoint in"),
        (["--workdir", "corrupt"], "config.json is corrupt"),
        (
            ["--workdir", "runs/tiny", "--prompt", "The quick brown fox"],
            "the prompt must fit the context of 16 tokens, got 19",
        ),
        (["--top-p", "1.5"], "--top-p must be in"),
        (["--interactive", "--prompt", "-"], "--interactive reads its prompts from standard input"),
        (["--interactive", "--num-samples", "2"], "--num-samples must be 1 with --interactive, got 2"),
    ],
)
def test_bad_input_to_sample(home, run, arguments, words):
    (home / "unfinished" / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer/tokenizer.json"):
        (home / "unfinished" / name).write_bytes((run[0] / name).read_bytes())
    (home / "corrupt").mkdir(exist_ok=True)
    (home / "corrupt" / "config.json").write_text("{")
    before = files_of(home)
    refused(home, command(home, "sample.py", *arguments), words, before)


def test_a_prompt_that_is_no_text(home, run):
    before = files_of(home)
    refused(
        home,
        command(home, "sample.py", "--workdir", run[0], "--prompt", b"\xff"),
        "--prompt must be UTF-8 text",
        before,
    )


def test_a_reader_that_goes_away_does_not_end_the_training(home, run):
    workdir = home / "piped"
    flags = ("--workdir", workdir, "--train.num-steps", "30", "--train.log-every", "1")
    with subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--config", home / "tiny.py", *flags],
        cwd=home,
        env=environment(home),
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait() == 0
    assert "step 30: train" in (workdir / "train.log").read_text()


def test_without_any_run_sampling_says_how_to_train_one(tmp_path):
    refused(tmp_path, command(tmp_path, "sample.py"), "train one with: python train.py --config configs/moe.py", {})


def test_a_work_directory_that_cannot_be_made_is_a_fault_of_the_environment(home):
    result = train(home, "--workdir", home / "verse.txt" / "run")
    assert result.returncode == 1
    assert re.fullmatch(r"error: Not a directory: [^\n]*verse.txt/run\n", result.stderr), result.stderr
