"""Every kind of bad input to every command: one line that says what to do, the right exit code, nothing written.

Two rows of each command are real processes; the others call the same function in this one. What a training finds out
once it has read the run and its text is in tests/training/test_resolve.py.
"""

import gzip
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys

import pytest

from moe_jax import errors
from moe_jax.data.tokenizer_file import save_tokenizer
from moe_jax.prepare.folder import prepare_folder
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.prepare.tokenizer import build_tokenizer
from moe_jax.runs.checkpoint.seal import seal
from tests.oracles.texts import VERSE
from tests.tiny import CONFIG, change, command, recipe, write_run

COMMANDS = {
    "train": ("moe_jax.commands.train", "train.py"),
    "sample": ("moe_jax.commands.sample", "sample.py"),
    "evaluate": ("moe_jax.commands.evaluate", "-m moe_jax.evaluate"),
    "prepare": ("moe_jax.commands.prepare", "-m moe_jax.prepare"),
}
TINY = change(CONFIG, data={"batch_size": 8}, optimizer={"warmup_steps": 1}, train={"num_steps": 2, "trackers": ()})
IN_A_RECIPE = "from moe_jax.config import *\ndef get_config():\n    return "
LINES = "".join(json.dumps({"text": f"{VERSE * 3}{index}"}) + "\n" for index in range(40))
FILES = {
    # Recipes.
    "tiny.py": recipe(TINY),
    "folder.py/readme.png": b"",
    "recipe.txt": recipe(TINY),
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
    write_run(folder / "runs/tiny", TINY)
    made = PrepareConfig(input=(str(folder / "good.jsonl"),), tokenizer="byte", out=str(folder / "prepared"))
    prepare_folder(made)
    for name in ("unfinished", "wordless", "garbled", "damaged", "format_1", "of_bytes"):
        shutil.copytree(folder / "runs/tiny", folder / name)
    shutil.rmtree(folder / "unfinished/checkpoints")
    shutil.rmtree(folder / "wordless/tokenizer")
    (folder / "garbled/tokenizer/tokenizer.json").write_text("{")
    # The record too, for it says which text the run was trained on, and here that is none.
    for item in ("params", "record"):
        files = (file for file in (folder / "damaged/checkpoints/2" / item).rglob("*") if file.is_file())
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


def row(line, exit_code, stderr, stdin=b"", within=".", real=False):
    return pytest.param(line, exit_code, stderr, stdin, within, real, id=line)


def mistake(line, message, **options):
    """A row: the user's mistake, reported in one line that has ``message`` in it."""
    return row(line, 2, rf"error: [^\n]*{re.escape(message)}[^\n]*\n", **options)


def box(line, message, **options):
    """A row: a mistyped flag or value, reported in the parser's box, which has no lines where pytest captures it."""
    return row(line, 2, rf"(?s)[╭ ].*{re.escape(message)}.*[╯ ]\n", **options)


def fault(line, message):
    """A row: a fault of the machine."""
    return row(line, 1, rf"error: {re.escape(message)}[^\n]*\n")


TRAIN, AT = "train --config tiny.py --workdir new", "train --config tiny.py --workdir"
INPUT, FROM = "prepare --out new --input", "prepare --input good.jsonl --out"
PREPARE = f"{FROM} new"
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
    mistake(f"{TRAIN} --model.moe.top-k 99", "model.moe.top_k must be in [1, num_experts=4], got 99", real=True),
    mistake(f"{TRAIN} --model.moe.router switch", "router=switch sends a token to one expert, but model.moe.top_k"),
    mistake(f"{TRAIN} --optimizer.learning-rate nan", "optimizer.learning_rate must be a finite number, got nan"),
    mistake(f"{TRAIN} --train.num-steps 99999999999", "train.num_steps must be in [1, 2147483647], got 99999999999"),
    mistake(f"{TRAIN} --train.profile 9:3", "train.profile must be START:STOP with START < STOP"),
    mistake(f"{TRAIN} --train.mlflow-uri sqlite:///x.db", "train.mlflow_uri is for train.trackers mlflow, got sqlite"),
    mistake(f"{TRAIN} --train.keep-every 0", "train.keep_every must be at least 1, got 0"),
    mistake(f"{TRAIN} --train.watchdog 1", "train.watchdog must be"),
    mistake(f"{TRAIN} --train.max-skipped-steps 0", "train.max_skipped_steps must be at least 1, got 0"),
    mistake(f"{TRAIN} --data.tokenizer word", "there is no tokenizer at word; name a tokenizer.json"),
    box(f"{TRAIN} --model.num-layer 3", "--model.num-layers", real=True),
    box(f"{TRAIN} --model.num-layers three", "'three'"),
    box(f"{TRAIN} --model.num-layers", "Missing value for argument '--model.num-layers'"),
    box(f"{TRAIN} --model.norm batchnorm", "('rmsnorm', 'layernorm')"),
    box(f"{TRAIN} runs/tiny", "Unrecognized options: runs/tiny"),
    mistake(f"{TRAIN} --data.batch-size 6 --optimizer.accumulation-steps 4", "must divide data.batch_size"),
    # What is trained on, and where.
    mistake(f"{TRAIN} --data.path s3://bucket/x.txt", "data.path must be a file or folder of this machine, got s3://"),
    mistake(f"{TRAIN} --data.path none.txt", "data.path=none.txt: the input none.txt does not exist"),
    mistake(f"{TRAIN} --data.path empty.txt", "empty.txt has no text in it"),
    mistake(f"{TRAIN} --data.path spaces.txt", "spaces.txt has no text in it"),
    mistake(f"{TRAIN} --data.path binary.txt", "binary.txt is not UTF-8 text (byte 128); convert it"),
    mistake(f"{TRAIN} --data.path one.txt", "leaves nothing to train on or to validate"),
    mistake(f"{TRAIN} --data.path prepared", "prepared was prepared with byte; leave it out"),
    mistake(f"{TRAIN} --data.tokenizer folder", "there is no tokenizer at folder/tokenizer.json; name"),
    mistake(
        f"{TRAIN} --data.path shortened --data.tokenizer None",
        "shortened/text/train-00000.bin must have 10470 bytes, has 1",
    ),
    mistake(f"{AT} gs://bucket/run", "--workdir must be a folder of this machine, got gs://bucket/run; mount"),
    mistake(f"{AT} ''", "--workdir must name a folder, got '', as of a variable"),
    fault(f"{AT} verse.txt/run", "Not a directory: verse.txt/run"),
    mistake(f"{AT} runs/tiny", "verse.txt is not the one this run was trained on"),
    # Sampling.
    mistake("sample", "train one with: python train.py --config configs/moe.py", within="folder"),
    mistake("sample --workdir none", "none is not a run directory (it has no config.json); train one"),
    mistake("sample --workdir ''", "--workdir must name a folder, got ''"),
    mistake("sample --workdir s3://bucket/run", "--workdir must be a folder of this machine, got s3://bucket/run;"),
    mistake("sample --workdir corrupt", "corrupt/config.json is corrupt"),
    mistake("sample --workdir deep", "deep/config.json is corrupt (it is more than 64 levels deep)"),
    mistake("sample --workdir older", "there is no setting model.embd_dim; did you mean model.embed_dim?"),
    mistake("sample --workdir unfinished", "there is no checkpoint in unfinished/checkpoints"),
    mistake("sample --workdir wordless", "no tokenizer at wordless/tokenizer/tokenizer.json; train the model again"),
    mistake("sample --workdir garbled", "garbled/tokenizer/tokenizer.json is corrupt"),
    mistake("sample --workdir damaged", "the best checkpoint damaged/checkpoints/2 is damaged"),
    mistake("sample --workdir format_1", "format_1/checkpoints/2 must have checkpoint format 2, got 1; use"),
    mistake(
        "sample --workdir of_bytes",
        "the tokenizer in of_bytes/tokenizer is not the one that the checkpoint was made with",
    ),
    mistake(
        "sample --workdir runs/tiny --prompt 'The quick brown fox'", "the prompt must fit the context of 16 tokens"
    ),
    mistake(f"sample --workdir runs/tiny --prompt {NOT_UTF_8}", "--prompt must be UTF-8 text, got another byte at 0"),
    mistake("sample --workdir runs/tiny --prompt -", "--prompt - must be UTF-8 text", stdin=b"a\xff"),
    mistake("sample --top-p 1.5", "--top-p must be in [0.0, 1.0], got 1.5", real=True),
    mistake("sample --temperature -0.1", "--temperature must be at least 0, got -0.1"),
    mistake("sample --num-samples 2000000000", "--num-samples must be in [1, 65536], got 2000000000"),
    mistake("sample --interactive --prompt -", "--interactive reads its prompts from standard input"),
    mistake("sample --interactive --prompt-file one.txt", "and takes no --prompt-file; leave one of them out"),
    mistake("sample --interactive --jsonl", "--interactive prints texts as they are made and takes no --jsonl"),
    mistake("sample --prompt a --prompt-file one.txt", "--prompt and --prompt-file both say what to continue"),
    mistake("sample --workdir runs/tiny --prompt-file none.txt", "--prompt-file must be a file, got none.txt"),
    mistake("sample --workdir runs/tiny --prompt-file broken.jsonl", "broken.jsonl:"),
    mistake("sample --stop ''", "each of --stop must have at least one character, got an empty text"),
    mistake("sample --interactive --num-samples 2", "--num-samples must be 1 with --interactive, got 2"),
    box("sample --checkpoint oldest", "('best', 'newest')", real=True),
    # Scoring.
    mistake("evaluate", "there is no run with a checkpoint in", within="folder"),
    mistake("evaluate --workdir gs://bucket/run", "--workdir must be a folder of this machine, got gs://bucket/run"),
    mistake("evaluate --workdir ''", "--workdir must name a folder, got ''"),
    mistake("evaluate --workdir corrupt", "corrupt/config.json is corrupt"),
    mistake("evaluate --workdir unfinished", "there is no checkpoint in unfinished/checkpoints", real=True),
    mistake("evaluate --workdir wordless", "no tokenizer at wordless/tokenizer/tokenizer.json"),
    mistake("evaluate --workdir damaged", "the best checkpoint damaged/checkpoints/2 is damaged"),
    mistake("evaluate --data https://example.com/x.txt", "--data must be a file or folder of this machine, got https"),
    mistake("evaluate --workdir runs/tiny --data none.txt", "--data none.txt: the input none.txt does not exist"),
    mistake("evaluate --workdir runs/tiny --data empty.txt", "empty.txt has no text in it"),
    mistake("evaluate --workdir runs/tiny --data binary.txt", "binary.txt is not UTF-8 text (byte 128)"),
    mistake("evaluate --workdir runs/tiny --data broken.jsonl", "broken.jsonl, line 3 is not JSON"),
    mistake(
        "evaluate --workdir runs/tiny --data prepared", "prepared has tokens of another tokenizer (byte) than runs"
    ),
    mistake("evaluate --workdir runs/tiny --data begun", "the preparation of begun was interrupted"),
    box("evaluate --split test", "('val',", real=True),
    # Preparing: the inputs.
    mistake("prepare", "--input is required: name files, folders, globs or hf:DATASET"),
    mistake(f"{INPUT} ''", "an input is an empty name, as of a variable"),
    mistake(f"{INPUT} none.txt", "the input none.txt does not exist"),
    mistake(f"{INPUT} 'none*.txt'", "the input none*.txt matches no file; change the pattern"),
    mistake(f"{INPUT} a=s3://bucket/x", "--input must be a file or folder of this machine, got a=s3://"),
    mistake(f"{INPUT} folder", "the input folder holds no file of a known format"),
    mistake(f"{INPUT} paper.pdf", "the input paper.pdf is of no known format"),
    mistake(f"{INPUT} empty.txt", "empty.txt has no text in it"),
    mistake(f"{INPUT} blank.jsonl", "blank.jsonl has no text in it"),
    mistake(f"{INPUT} one.txt", "leaves nothing to train on or to validate"),
    mistake(f"{INPUT} latin.txt", "latin.txt is not UTF-8 text (byte 3); convert it, or prepare it"),
    mistake(f"{INPUT} nul.txt", "nul.txt is not text (a NUL byte at 2)"),
    mistake(f"{INPUT} good.jsonl key.jsonl", "key.jsonl, line 2 has no key text (txt); correct the line"),
    mistake(f"{INPUT} broken.jsonl", "broken.jsonl, line 3 is not JSON"),
    mistake(f"{INPUT} number.jsonl", "number.jsonl, line 1: text must be a string, got int"),
    mistake(f"{INPUT} cut.jsonl.gz", "cut.jsonl.gz is damaged or cut short"),
    mistake(f"{INPUT} plain.txt.gz", "plain.txt.gz is damaged or cut short (Not a gzipped file"),
    mistake(f"{INPUT} column.csv", "column.csv has no column text; prepare it with --text-key and"),
    mistake(f"{INPUT} empty.csv", "empty.csv has no column text, it has none at all; give it a first"),
    mistake(f"{INPUT} ragged.csv", "ragged.csv, line 3: a row must have the header's 2 fields, got 1"),
    mistake(f"{INPUT} quote.csv", "quote.csv, line 2: unexpected end of data"),
    mistake(f"{INPUT} good.jsonl good.jsonl", "two sources called good.jsonl"),
    mistake(f"{INPUT} tokenizer=good.jsonl", "a corpus cannot be called tokenizer"),
    # Preparing: everything else.
    mistake("prepare --input good.jsonl", "--out is required: name the folder to write"),
    mistake(f"{FROM} gs://bucket/x", "--out must be a folder of this machine, got gs://"),
    mistake(f"{FROM} one.txt", "--out must be a folder, but one.txt is a file"),
    fault(f"{FROM} one.txt/new", "Not a directory: one.txt/new"),
    mistake(f"{FROM} folder", "--out folder holds other files; choose a new or an empty folder"),
    mistake(f"{FROM} prepared --tokenizer char", "tokenizer was byte, now char; choose another"),
    mistake(f"{FROM} begun --tokenizer byte", "begun/progress.json is corrupt"),
    mistake(f"{PREPARE} --val-input none.txt", "the input none.txt does not exist"),
    mistake(f"{PREPARE} --val-input gs://bucket/x", "--val-input must be a file or folder of this machine, got gs://"),
    mistake(f"{PREPARE} --val-input empty.txt", "empty.txt has no text in it"),
    mistake(f"{PREPARE} --val-input good.jsonl", "--val-input and --input of text both name"),
    mistake(f"{PREPARE} --val-input other=verse.txt", "--val-input names the corpus other, which --input does not"),
    mistake(f"{PREPARE} --val-documents 40", "--val-documents must leave something to train on, got 40 of the 40"),
    mistake(f"{PREPARE} --val-fraction 0", "--val-fraction must be in [0.0001, 0.9], got 0.0"),
    mistake(f"{PREPARE} --max-documents 0", "--max-documents must be at least 1, got 0"),
    mistake(f"{PREPARE} --separator ''", "--separator must have at least one character"),
    mistake(f"{PREPARE} --tokenizer word", "there is no tokenizer at word; name"),
    mistake(f"{PREPARE} --tokenizer bpe:100", "needs VOCAB in [300, 262144], got 100", real=True),
    mistake(f"{PREPARE} --tokenizer words", "words/tokenizer.json is corrupt (Object missing required field"),
    mistake(f"{PREPARE} --tokenizer folder", "there is no tokenizer at folder/tokenizer.json; name a tokenizer.json"),
    mistake(f"{PREPARE} --tokenizer deep", "deep/tokenizer.json is not a tokenizer.json (it is more than 64 levels"),
    mistake(f"{PREPARE} --tokenizer gpt2 --delimiters chat", "has no special token <|im_start|>"),
    mistake(f"{PREPARE} --text-key story", "good.jsonl, line 1 has no key story (text)"),
    mistake(f"{PREPARE} --text-key other=text", "--text-key names the corpus other, which --input does not"),
    mistake(f"{PREPARE} --weights 2", "--weights must be NAME=NUMBER for every corpus, and lacks text"),
    mistake(f"{PREPARE} --weights text=none", "--weights text=none must be a number above 0, such as text=2"),
    mistake(f"{PREPARE} --weights text=1 text=2", "--weights must name a corpus once, got 1 and 2 for text"),
    box(f"{PREPARE} --tokeniser byte", "run python -m moe_jax.prepare --help", real=True),
]


@pytest.fixture
def signals():
    """A command may take signals over for as long as its process lives."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("line", "exit_code", "stderr", "stdin", "within", "real"), BAD_INPUT)
@pytest.mark.usefixtures("signals")
def test_bad_input_is_reported_at_once_and_changes_nothing(
    home, monkeypatch, capsys, line, exit_code, stderr, stdin, within, real
):
    before = content_of(home)
    name, *arguments = shlex.split(line)
    module, script = COMMANDS[name]
    if real:
        done = command(home / within, *script.split(), *arguments, cache=home.parent / "cache")
        code, output, told = done.returncode, done.stdout, done.stderr
    else:
        monkeypatch.chdir(home / within)
        monkeypatch.setenv("GLIBC_TUNABLES", "")  # this process is not to be started again for huge pages
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            errors.run(importlib.import_module(module).main)
        code, (output, told) = ended.value.code, capsys.readouterr()
    assert re.fullmatch(stderr, told), told
    assert (code, output) == (exit_code, "")
    assert content_of(home) == before
