"""Recipes: whole ones as the README runs them, minutes each; and those of prepared text on stand-ins of its format."""

import csv
import dataclasses
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from moe_jax.command_line import load_recipe, parse_prepare
from moe_jax.data.prepare import prepare_folder
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.metrics import read_metrics
from moe_jax.sampling.generator import load_generator
from moe_jax.training.run import train
from tests.oracles.texts import VERSE

ROOT = Path(__file__).parents[1]


def run(folder, *arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "bits_per_byte"), [("moe", 2.20), ("dense", 2.30)])
def test_a_recipe_reaches_its_loss_and_speaks(tmp_path, recipe, bits_per_byte):
    run(tmp_path, "train.py", "--config", f"configs/{recipe}.py", "--workdir", str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    reached = [line["val/bits_per_byte"] for line in lines if "val/bits_per_byte" in line]
    assert reached[-1] <= bits_per_byte
    assert reached == sorted(reached, reverse=True)
    text = run(tmp_path, "sample.py", "--workdir", str(tmp_path / "run"), "--max-new-tokens", "400")
    # Speakers in capitals and a colon, on lines of their own, as in the plays.
    assert sum(line.endswith(":") and line.isupper() for line in text.splitlines()) >= 3


def prepare_commands(recipe):
    """The arguments of each prepare command in a recipe's docstring."""
    text = (ROOT / "configs" / f"{recipe}.py").read_text()
    commands = re.findall(r"python -m moe_jax\.data\.prepare ((?:.*\\\n)*.*)", text)
    return [shlex.split(command.replace("\\\n", " ")) for command in commands]


def stories(number):
    return [VERSE * (1 + index % 3) + f"story {index}." for index in range(number)]


def write_parquet(folder, name, texts):
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / name)


def write_csv(file, header, rows):
    with open(file, "w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


def tinystories_files(folder):
    data = folder / "TinyStories" / "data"
    write_parquet(data, "train-00000-of-00002.parquet", stories(40))
    write_parquet(data, "train-00001-of-00002.parquet", [text.upper() for text in stories(40)])
    write_parquet(data, "validation-00000-of-00001.parquet", stories(9))


def five_corpora_files(folder):
    text = folder / "text"
    (text / "bbc" / "sport").mkdir(parents=True)
    for index in range(30):
        article = f"Sport {index}\n\n{VERSE * 3} \xa3"  # not UTF-8, as some of the BBC's are
        (text / "bbc" / "sport" / f"{index:03}.txt").write_bytes(article.encode("latin-1"))
    lines = stories(50)
    write_csv(
        text / "avengers.csv", ["", "character", "dialogue"], [[i, "TONY", line] for i, line in enumerate(lines)]
    )
    write_csv(text / "physics.csv", ["title", "text"], [["A page", f'"{line}"\nmore'] for line in lines])
    (text / "wikipedia").mkdir()
    for letter in "AB":
        lines = "".join(json.dumps({"text": letter + text}) + "\n" for text in stories(30))
        (text / "wikipedia" / f"{letter}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


def shrunk(recipe, path):
    config = load_recipe(ROOT / "configs" / f"{recipe}.py")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            context_length=32,
            num_layers=1,
            embed_dim=32,
            scan_unroll=1,
            moe=dataclasses.replace(config.model.moe, expert_dim=16, num_experts=4),
        ),
        data=dataclasses.replace(config.data, path=str(path), batch_size=8),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-2, warmup_steps=2),
        train=dataclasses.replace(config.train, num_steps=12, eval_every=6, log_every=6),
        sample=dataclasses.replace(config.sample, max_new_tokens=8),
    )


def test_stories_by_name_are_those_of_the_parquet_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    tinystories_files(tmp_path)
    made = []
    for place, arguments in enumerate(prepare_commands("tinystories")):
        # The hub's name stands for a local data set of the same files.
        arguments = [item.replace("roneneldan/TinyStories", "./TinyStories") for item in arguments]
        config = dataclasses.replace(parse_prepare(arguments, ""), out=str(tmp_path / str(place)))
        made.append(prepare_folder(config))
    assert made[0].fingerprint == made[1].fingerprint


@pytest.mark.parametrize(
    ("recipe", "files", "command"), [("tinystories", tinystories_files, 1), ("five_corpora", five_corpora_files, 0)]
)
def test_a_recipe_of_prepared_text_on_files_of_its_format(tmp_path, monkeypatch, recipe, files, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files(tmp_path)
    arguments = prepare_commands(recipe)[command]
    if recipe == "five_corpora":
        # Whole plays would take most of this test's time: other text stands for them.
        (tmp_path / "plays.txt").write_text(VERSE * 400)
        arguments = [item.replace("bpe:8192", "bpe:512").replace("=plays:", "=plays.txt") for item in arguments]
    data = prepare_folder(parse_prepare(arguments, ""))
    config = load_recipe(ROOT / "configs" / f"{recipe}.py")
    assert Path(str(config.data.path)).resolve() == data.folder.resolve(), "the recipe reads what its command makes"
    train(shrunk(recipe, data.folder), tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    losses = [line["val/loss"] for line in read_metrics(run.metrics_file) if "val/loss" in line]
    assert losses[1] < losses[0]
    generator, variables = load_generator(run, "newest")
    assert len(generator.generate(variables, "the quick", config.sample)) == 1
    if recipe == "five_corpora":
        assert [corpus.weight for corpus in data.corpora] == [0.2, 0.1, 0.2, 0.2, 0.3]
        counts = [corpus.train.num_documents + corpus.val.num_documents for corpus in data.corpora]
        assert counts == [30, 50, 2, 50, 60], "the held-out end of a single document is one, too"
    else:
        assert (data.tokenizer.delimiters, data.corpora[0].val.num_documents) == ("chat", 9)
