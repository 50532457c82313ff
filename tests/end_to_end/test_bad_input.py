"""Every kind of bad input to every command: one line that says what to do, the right exit code, nothing written."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.cli import load_recipe
from moe_jax.data.tokenizer import build_tokenizer, save_tokenizer
from moe_jax.runs.checkpoint.seal import seal
from tests.oracles.runs import write_run
from tests.oracles.texts import VERSE

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "train": [str(ROOT / "train.py")],
    "sample": [str(ROOT / "sample.py")],
    "evaluate": ["-m", "moe_jax.evaluate"],
    "prepare": ["-m", "moe_jax.prepare"],
}
TINY = """
from moe_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(context_length=16, num_layers=1, embed_dim=16, num_heads=2,
                          moe=MoEConfig(num_experts=4, expert_dim=16)),
        data=DataConfig(path="verse.txt", tokenizer="char", batch_size=4),
        optimizer=OptimizerConfig(warmup_steps=1),
        train=TrainConfig(num_steps=2, trackers=()),
    )
"""
IN_A_RECIPE = "from moe_jax.config import *\ndef get_config():\n    return "
LINES = "".join(json.dumps({"text": f"{VERSE * 3}{index}"}) + "\n" for index in range(40))
FILES = {
    # Recipes.
    "tiny.py": TINY,
    "folder.py/readme.png": b"",
    "recipe.txt": TINY,
    "syntax.py": "def get_config(:\n",
    "without.py": "settings = 3\n",
    "raises.py": "def get_config():\n    return 1 / 0\n",
    "missing.py": "import nothing_of_that_name\n",
    "ends.py": "import sys\nsys.exit(0)\n",
    "number.py": "def get_config():\n    return 3\n",
    "unknown.py": IN_A_RECIPE + "Config(model=ModelConfig(embd_dim=3))\n",
    "section.py": IN_A_RECIPE + "Config(model=3)\n",
    "words.py": IN_A_RECIPE + "Config(model=ModelConfig(num_layers='3'))\n",
    # Texts.
    "verse.txt": VERSE * 50,
    "good.jsonl": LINES,
    "empty.txt": b"",
    "spaces.txt": b"\n \n",
    "one.txt": b"x",
    "binary.txt": bytes(range(256)),
    "latin.txt": "caf\xe9".encode("latin-1"),
    "nul.txt": b"ab\0c",
    "paper.pdf": b"%PDF",
    "blank.jsonl": b'{"text": " "}\n',
    "key.jsonl": b'{"text": "a"}\n{"txt": "b"}\n',
    "broken.jsonl": b'{"text": "a"}\n\n{"text": "b"\n',
    "number.jsonl": b'{"text": 3}\n',
    "cut.jsonl.gz": gzip.compress(LINES.encode())[:-9],
    "plain.txt.gz": b"not compressed",
    "column.csv": b"title,body\nx,y\n",
    "empty.csv": b"",
    "ragged.csv": b"text,title\nx,y\nz\n",
    "quote.csv": b'text\n"abc\n',
    "folder/readme.png": b"",
    # Tokenizers.
    "words/tokenizer.json": b"{}",
    "deep/tokenizer.json": b'{"model":' * 100_000,
    # Run directories that are none.
    "corrupt/config.json": b"{",
    "deep/config.json": b'{"model":' * 100_000,
    "older/config.json": b'{"model": {"embd_dim": 3}}',
}


def run(home, command, stdin=b""):
    """Runs a line of the table, as ``python`` would in the folder ``home``."""
    name, *arguments = shlex.split(command)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XDG_CACHE_HOME": str(home.parent / "cache"),
    }
    return subprocess.run(
        [sys.executable, *COMMANDS[name], *arguments],
        cwd=home,
        env=environment,
        input=stdin,
        capture_output=True,
        timeout=120,
        check=False,
    )


def content_of(folder):
    """Every folder, and every file with its bytes; of a lock only that it is there, for it names its last owner."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() or path.name == ".lock" else path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of good and bad things, among them a run, a prepared folder and damaged copies of both."""
    folder = tmp_path_factory.mktemp("bad_input") / "home"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    write_run(folder / "runs/tiny", load_recipe(folder / "tiny.py"))
    done = run(folder, "prepare --input good.jsonl --tokenizer byte --out prepared")
    assert done.returncode == 0, done.stderr
    for name in ("unfinished", "wordless", "garbled", "damaged", "format_1", "of_bytes"):
        shutil.copytree(folder / "runs/tiny", folder / name)
    shutil.rmtree(folder / "unfinished/checkpoints")
    shutil.rmtree(folder / "wordless/tokenizer")
    (folder / "garbled/tokenizer/tokenizer.json").write_text("{")
    # The record too, for it says which text the run was trained on, and here that is none.
    for item in ("params", "record"):
        files = [file for file in (folder / "damaged/checkpoints/2" / item).rglob("*") if file.is_file()]
        largest = max(files, key=lambda file: file.stat().st_size)
        largest.write_bytes(b"?" * largest.stat().st_size)
    (folder / "format_1/checkpoints/2/record").rename(folder / "format_1/checkpoints/2/progress")
    seal(folder / "format_1/checkpoints/2")
    save_tokenizer(build_tokenizer("byte", []), folder / "of_bytes/tokenizer")
    for name in ("shortened", "begun"):
        shutil.copytree(folder / "prepared", folder / name)
    (folder / "shortened/text/train-00000.bin").write_bytes(b"?")
    (folder / "begun/meta.json").unlink()
    (folder / "begun/progress.json").write_text("{")
    return folder


def mistake(command, message, *, stdin=b"", within=".", slow=False):
    """A row: the user's mistake, told in one line that has ``message`` in it, in the folder ``within``.

    ``slow``: for the slow run; the default one has its like.
    """
    marks = pytest.mark.slow if slow else ()
    return pytest.param(
        command, 2, rf"error: [^\n]*{re.escape(message)}[^\n]*\n", stdin, within, id=command, marks=marks
    )


def box(command, message):
    """A row: a mistyped flag or value, told in the box of the parser of flags."""
    return pytest.param(command, 2, rf"(?s)╭.*{re.escape(message)}.*╯\n", b"", ".", id=command)


def fault(command, message):
    """A row: a fault of the machine."""
    return pytest.param(command, 1, rf"error: {re.escape(message)}[^\n]*\n", b"", ".", id=command)


TRAIN, PREPARE = "train --config tiny.py", "prepare --input good.jsonl --out new"
NOT_UTF_8 = os.fsdecode(b"\xff")
BAD_INPUT = [
    # Recipes.
    mistake("train", "--config is required: name a recipe, such as --config configs/moe.py"),
    mistake("train --config=", "--config is required"),
    mistake("train --config none.py", "--config none.py does not exist; recipes here: none"),
    mistake("train --config folder.py", "--config folder.py is a folder"),
    mistake("train --config recipe.txt", "recipe.txt is not a Python file; a recipe ends in .py"),
    mistake("train --config syntax.py", "syntax.py:1: SyntaxError: invalid syntax"),
    mistake("train --config without.py", "without.py: a recipe needs a function get_config()"),
    mistake("train --config raises.py", "raises.py:2: ZeroDivisionError: division by zero"),
    mistake("train --config missing.py", "missing.py:1: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    mistake("train --config ends.py", "ends.py:2: a recipe must return its settings, but ends the program"),
    mistake("train --config number.py", "get_config() must return a moe_jax.config.Config, got int"),
    mistake("train --config unknown.py", "unknown.py:3: there is no setting ModelConfig.embd_dim; did you mean"),
    mistake("train --config section.py", "section.py: model must be of type ModelConfig, got 3 of type int"),
    mistake("train --config words.py", "words.py: model.num_layers must be of type int, got '3' of type str"),
    # Settings.
    mistake(f"{TRAIN} --model.moe.top-k 99", "model.moe.top_k must be in [1, num_experts=4], got 99; lower top_k"),
    mistake(
        f"{TRAIN} --model.moe.router switch", "router=switch sends a token to one expert, but model.moe.top_k is 2"
    ),
    mistake(f"{TRAIN} --optimizer.learning-rate nan", "optimizer.learning_rate must be a finite number, got nan"),
    mistake(f"{TRAIN} --train.num-steps 99999999999", "train.num_steps must be in [1, 2147483647], got 99999999999"),
    mistake(f"{TRAIN} --train.profile 9:3", "train.profile must be START:STOP with START < STOP"),
    mistake(f"{TRAIN} --train.mlflow-uri sqlite:///x.db", "train.mlflow_uri is for train.trackers mlflow, got sqlite"),
    mistake(f"{TRAIN} --workdir format_1", "must have checkpoint format 2, got 1; use the older moe_jax"),
    mistake(f"{TRAIN} --workdir new --train.init-from nowhere", "nowhere is not a run directory", slow=True),
    mistake(f"{TRAIN} --train.keep-every 0", "train.keep_every must be at least 1, got 0"),
    mistake(f"{TRAIN} --train.watchdog 1", "train.watchdog must be"),
    mistake(f"{TRAIN} --train.max-skipped-steps 0", "train.max_skipped_steps must be at least 1, got 0"),
    mistake(f"{TRAIN} --data.tokenizer word", "data.tokenizer must be char, byte, bpe:VOCAB"),
    box(f"{TRAIN} --model.num-layer 3", "--model.num-layers"),
    box(f"{TRAIN} --model.num-layers three", "'three'"),
    box(f"{TRAIN} --model.num-layers", "Missing value for argument '--model.num-layers'"),
    box(f"{TRAIN} --model.norm batchnorm", "('rmsnorm', 'layernorm')"),
    box(f"{TRAIN} runs/tiny", "Unrecognized options: runs/tiny"),
    mistake(f"{TRAIN} --workdir new --model.moe.dispatch tokamax", "tokamax needs an NVIDIA GPU, got a cpu"),
    mistake(f"{TRAIN} --workdir new --mesh.data 3", "mesh.data must be at most the 1 devices here, got 3", slow=True),
    mistake(
        f"{TRAIN} --workdir new --data.batch-size 6 --optimizer.accumulation-steps 4", "must divide data.batch_size"
    ),
    # What is trained on, and where.
    mistake(f"{TRAIN} --data.path s3://bucket/x.txt", "data.path must be a file or folder of this machine, got s3://"),
    mistake(f"{TRAIN} --data.path none.txt", "data.path=none.txt: the input none.txt does not exist"),
    mistake(f"{TRAIN} --workdir new --data.path empty.txt", "empty.txt has no text in it", slow=True),
    mistake(f"{TRAIN} --workdir new --data.path spaces.txt", "spaces.txt has no text in it", slow=True),
    mistake(f"{TRAIN} --workdir new --data.path binary.txt", "binary.txt is not UTF-8 text (byte 128); convert it"),
    mistake(f"{TRAIN} --workdir new --data.path one.txt", "leaves nothing to train on or to validate", slow=True),
    mistake(f"{TRAIN} --workdir new --data.path prepared", "prepared was prepared with byte; leave it out", slow=True),
    mistake(
        f"{TRAIN} --workdir new --data.tokenizer folder",
        "there is no tokenizer at folder/tokenizer.json; name",
        slow=True,
    ),
    mistake(
        f"{TRAIN} --workdir new --data.path shortened --data.tokenizer None",
        "shortened/text/train-00000.bin must have 10470 bytes, has 1; put a copy of it back",
        slow=True,
    ),
    mistake(
        f"{TRAIN} --workdir new --model.context-length 9999",
        "must have at least model.context_length + 1 = 10000 tokens, got 2139",
        slow=True,
    ),
    mistake(
        f"{TRAIN} --workdir gs://bucket/run",
        "--workdir must be a folder of this machine, got gs://bucket/run; mount the bucket, or copy the run directory "
        "there afterwards",
    ),
    mistake(f"{TRAIN} --workdir ''", "--workdir must name a folder, got '', as of a variable that is not set"),
    mistake(f"{TRAIN} --workdir verse.txt", "--workdir must be a folder, but verse.txt is a file; choose another"),
    fault(f"{TRAIN} --workdir verse.txt/run", "Not a directory: verse.txt/run"),
    mistake(f"{TRAIN} --workdir corrupt", "corrupt/config.json is corrupt", slow=True),
    mistake(
        f"{TRAIN} --workdir runs/tiny --model.num-layers 2", "model.num_layers was 1, now 2; use the old", slow=True
    ),
    mistake(f"{TRAIN} --workdir runs/tiny", "verse.txt is not the one this run was trained on", slow=True),
    mistake(f"{TRAIN} --workdir damaged --train.num-steps 3", "every checkpoint in", slow=True),
    # Sampling.
    mistake("sample", "train one with: python train.py --config configs/moe.py", within="folder"),
    mistake("sample --workdir none", "none is not a run directory (it has no config.json); train one with train.py"),
    mistake("sample --workdir ''", "--workdir must name a folder, got ''"),
    mistake(
        "sample --workdir s3://bucket/run",
        "--workdir must be a folder of this machine, got s3://bucket/run; mount the bucket, or copy the run directory "
        "here first",
    ),
    mistake("sample --workdir corrupt", "corrupt/config.json is corrupt"),
    mistake("sample --workdir deep", "deep/config.json is corrupt (maximum recursion depth exceeded"),
    mistake("sample --workdir older", "there is no setting model.embd_dim; did you mean model.embed_dim?"),
    mistake("sample --workdir unfinished", "there is no checkpoint in unfinished/checkpoints"),
    mistake(
        "sample --workdir wordless",
        "no tokenizer at wordless/tokenizer/tokenizer.json; train the model again",
        slow=True,
    ),
    mistake("sample --workdir garbled", "garbled/tokenizer/tokenizer.json is corrupt"),
    mistake("sample --workdir damaged", "the best checkpoint damaged/checkpoints/2 is damaged", slow=True),
    mistake(
        "sample --workdir format_1",
        "format_1/checkpoints/2 must have checkpoint format 2, got 1; use the older moe_jax that wrote it",
        slow=True,
    ),
    mistake("sample --workdir of_bytes", "of_bytes/checkpoints/2 is not of the model that its run's config.json and"),
    mistake(
        "sample --workdir runs/tiny --prompt 'The quick brown fox'",
        "the prompt must fit the context of 16 tokens, got 19; shorten the prompt",
    ),
    mistake(f"sample --workdir runs/tiny --prompt {NOT_UTF_8}", "--prompt must be UTF-8 text, got another byte at 0"),
    mistake("sample --workdir runs/tiny --prompt -", "--prompt - must be UTF-8 text", stdin=b"a\xff", slow=True),
    mistake("sample --top-p 1.5", "--top-p must be in [1e-06, 1.0], got 1.5"),
    mistake("sample --temperature 0.0001", "--temperature must be 0 (the most likely token) or at least 0.001"),
    mistake("sample --num-samples 2000000000", "--num-samples must be in [1, 65536], got 2000000000"),
    mistake("sample --interactive --prompt -", "--interactive reads its prompts from standard input"),
    mistake("sample --interactive --prompt-file one.txt", "and takes no --prompt-file; leave one of them out"),
    mistake("sample --interactive --jsonl", "--interactive prints texts as they are made and takes no --jsonl"),
    mistake("sample --prompt a --prompt-file one.txt", "--prompt and --prompt-file both say what to continue"),
    mistake("sample --workdir runs/tiny --prompt-file none.txt", "--prompt-file must be a file, got none.txt"),
    mistake("sample --workdir runs/tiny --prompt-file broken.jsonl", "broken.jsonl:", slow=True),
    mistake("sample --stop ''", "each of --stop must have at least one character, got an empty text"),
    mistake("sample --interactive --num-samples 2", "--num-samples must be 1 with --interactive, got 2"),
    box("sample --checkpoint oldest", "('best', 'newest')"),
    # Scoring.
    mistake("evaluate", "there is no run with a checkpoint in", within="folder"),
    mistake("evaluate --workdir gs://bucket/run", "--workdir must be a folder of this machine, got gs://bucket/run"),
    mistake("evaluate --workdir ''", "--workdir must name a folder, got ''"),
    mistake("evaluate --workdir corrupt", "corrupt/config.json is corrupt"),
    mistake("evaluate --workdir unfinished", "there is no checkpoint in unfinished/checkpoints", slow=True),
    mistake("evaluate --workdir wordless", "no tokenizer at wordless/tokenizer/tokenizer.json", slow=True),
    mistake("evaluate --workdir damaged", "the best checkpoint damaged/checkpoints/2 is damaged", slow=True),
    mistake("evaluate --data https://example.com/x.txt", "--data must be a file or folder of this machine, got https"),
    mistake(
        "evaluate --workdir runs/tiny --data none.txt", "--data none.txt: the input none.txt does not exist", slow=True
    ),
    mistake("evaluate --workdir runs/tiny --data empty.txt", "empty.txt has no text in it", slow=True),
    mistake("evaluate --workdir runs/tiny --data binary.txt", "binary.txt is not UTF-8 text (byte 128)", slow=True),
    mistake("evaluate --workdir runs/tiny --data broken.jsonl", "broken.jsonl, line 3 is not JSON", slow=True),
    mistake(
        "evaluate --workdir runs/tiny --data prepared",
        "prepared has tokens of another tokenizer (byte) than runs/tiny (char); prepare it with --tokenizer",
    ),
    mistake("evaluate --workdir runs/tiny --data begun", "the preparation of begun was interrupted", slow=True),
    box("evaluate --split test", "('val',"),
    # Preparing: the inputs.
    mistake("prepare", "--input is required: name files, folders, globs or hf:DATASET"),
    mistake("prepare --input '' --out new", "an input is an empty name, as of a variable that is not set"),
    mistake("prepare --input none.txt --out new", "the input none.txt does not exist"),
    mistake(
        "prepare --input 'none*.txt' --out new", "the input none*.txt matches no file; change the pattern", slow=True
    ),
    mistake(
        "prepare --input a=s3://bucket/x --out new", "--input must be a file or folder of this machine, got a=s3://"
    ),
    mistake("prepare --input folder --out new", "the input folder holds no file of a known format"),
    mistake("prepare --input paper.pdf --out new", "the input paper.pdf is of no known format"),
    mistake("prepare --input empty.txt --out new", "empty.txt has no text in it"),
    mistake("prepare --input blank.jsonl --out new", "blank.jsonl has no text in it", slow=True),
    mistake("prepare --input one.txt --out new", "leaves nothing to train on or to validate"),
    mistake("prepare --input latin.txt --out new", "latin.txt is not UTF-8 text (byte 3); convert it, or prepare it"),
    mistake("prepare --input nul.txt --out new", "nul.txt is not text (a NUL byte at 2)", slow=True),
    mistake(
        "prepare --input good.jsonl key.jsonl --out new", "key.jsonl, line 2 has no key text (txt); mend the line"
    ),
    mistake("prepare --input broken.jsonl --out new", "broken.jsonl, line 3 is not JSON"),
    mistake(
        "prepare --input number.jsonl --out new", "number.jsonl, line 1: text must be a string, got int", slow=True
    ),
    mistake("prepare --input cut.jsonl.gz --out new", "cut.jsonl.gz is damaged or cut short"),
    mistake(
        "prepare --input plain.txt.gz --out new", "plain.txt.gz is damaged or cut short (Not a gzipped file", slow=True
    ),
    mistake("prepare --input column.csv --out new", "column.csv has no column text; prepare it with --text-key and"),
    mistake(
        "prepare --input empty.csv --out new", "empty.csv has no column text, it has none at all; give it a first"
    ),
    mistake(
        "prepare --input ragged.csv --out new",
        "ragged.csv, line 3: a row must have the header's 2 fields, got 1",
        slow=True,
    ),
    mistake("prepare --input quote.csv --out new", "quote.csv, line 2: unexpected end of data", slow=True),
    mistake("prepare --input good.jsonl good.jsonl --out new", "two sources called good.jsonl"),
    mistake("prepare --input tokenizer=good.jsonl --out new", "a corpus cannot be called tokenizer", slow=True),
    # Preparing: everything else.
    mistake("prepare --input good.jsonl", "--out is required: name the folder to write"),
    mistake(
        "prepare --input good.jsonl --out gs://bucket/x",
        "--out must be a folder of this machine, got gs://bucket/x; mount the bucket, or copy the folder there",
    ),
    mistake("prepare --input good.jsonl --out one.txt", "--out must be a folder, but one.txt is a file"),
    fault("prepare --input good.jsonl --out one.txt/new", "Not a directory: one.txt/new"),
    mistake(
        "prepare --input good.jsonl --out folder", "--out folder holds other files; choose a new or an empty folder"
    ),
    mistake(
        "prepare --input good.jsonl --out prepared --tokenizer char", "tokenizer was byte, now char; choose another"
    ),
    mistake("prepare --input good.jsonl --out begun --tokenizer byte", "begun/progress.json is corrupt", slow=True),
    mistake(f"{PREPARE} --val-input none.txt", "the input none.txt does not exist", slow=True),
    mistake(f"{PREPARE} --val-input gs://bucket/x", "--val-input must be a file or folder of this machine, got gs://"),
    mistake(f"{PREPARE} --val-input empty.txt", "empty.txt has no text in it"),
    mistake(f"{PREPARE} --val-input good.jsonl", "--val-input and --input of text both name"),
    mistake(
        f"{PREPARE} --val-input other=verse.txt",
        "--val-input names the corpus other, which --input does not",
        slow=True,
    ),
    mistake(f"{PREPARE} --val-documents 40", "--val-documents must leave something to train on, got 40 of the 40"),
    mistake(f"{PREPARE} --val-fraction 0", "--val-fraction must be in [0.0001, 0.9], got 0.0"),
    mistake(f"{PREPARE} --max-documents 0", "--max-documents must be at least 1, got 0", slow=True),
    mistake(f"{PREPARE} --separator ''", "--separator must have at least one character", slow=True),
    mistake(f"{PREPARE} --tokenizer word", "--tokenizer must be char, byte, bpe:VOCAB", slow=True),
    mistake(f"{PREPARE} --tokenizer bpe:100", "needs VOCAB in [300, 262144], got 100"),
    mistake(f"{PREPARE} --tokenizer words", "words/tokenizer.json is corrupt (it has no 'version')"),
    mistake(f"{PREPARE} --tokenizer folder", "there is no tokenizer at folder/tokenizer.json; name a tokenizer.json"),
    mistake(
        f"{PREPARE} --tokenizer deep",
        "deep/tokenizer.json is not a tokenizer.json (maximum recursion depth",
        slow=True,
    ),
    mistake(f"{PREPARE} --tokenizer gpt2 --delimiters chat", "has no special token <|im_start|>"),
    mistake(f"{PREPARE} --text-key story", "good.jsonl, line 1 has no key story (text)"),
    mistake(
        f"{PREPARE} --text-key other=text", "--text-key names the corpus other, which --input does not", slow=True
    ),
    mistake(f"{PREPARE} --weights 2", "--weights must be NAME=NUMBER for every corpus, and lacks text", slow=True),
    mistake(f"{PREPARE} --weights text=none", "--weights text=none must be a number above 0, such as text=2"),
    mistake(f"{PREPARE} --weights text=1 text=2", "--weights must name a corpus once, got 1 and 2 for text"),
    box(f"{PREPARE} --tokeniser byte", "run python -m moe_jax.prepare --help"),
]


@pytest.mark.parametrize(("command", "exit_code", "stderr", "stdin", "within"), BAD_INPUT)
def test_bad_input_is_told_at_once_and_changes_nothing(home, command, exit_code, stderr, stdin, within):
    before = content_of(home)
    done = run(home / within, command, stdin)
    said = done.stderr.decode()
    assert re.fullmatch(stderr, said), said
    assert (done.returncode, done.stdout) == (exit_code, b"")
    assert content_of(home) == before
