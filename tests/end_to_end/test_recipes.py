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
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from moe_jax.cli import load_recipe
from moe_jax.commands.training import train
from moe_jax.config import Config, MeshConfig
from moe_jax.config.rules import check
from moe_jax.files import cache_folder
from moe_jax.model.decoder import Decoder, Tokens
from moe_jax.prepare.cache import find_or_prepare
from moe_jax.prepare.folder import prepare_folder
from moe_jax.prepare.settings import parse_prepare
from moe_jax.runs.layout import RunDirectory, saved_steps
from moe_jax.runs.metrics_file import read_metrics
from moe_jax.runs.opened import open_run
from moe_jax.sampling.api import load_engine
from moe_jax.training.flops import count_params
from tests.oracles.moe import on_cpu
from tests.oracles.texts import VERSE

ROOT = Path(__file__).parents[2]


PAST_CONTEXT = "note: past the context of 128 tokens the oldest tokens left the cache one by one (rotary positions)\n"


def run(folder, *arguments, told=""):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, told)
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "bits_per_byte"), [("moe", 2.06), ("dense", 2.07)])
def test_a_recipe_reaches_its_loss_and_speaks(tmp_path, recipe, bits_per_byte):
    run(tmp_path, "train.py", "--config", f"configs/{recipe}.py", "--workdir", str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    reached = [line["val/bits_per_byte"] for line in lines if "val/bits_per_byte" in line]
    assert reached[-1] <= bits_per_byte
    assert reached == sorted(reached, reverse=True)
    longer = ("--num-samples", "4", "--max-new-tokens", "400")
    text = run(tmp_path, "sample.py", "--workdir", str(tmp_path / "run"), *longer, told=PAST_CONTEXT)
    # Speakers in capitals and a colon, on lines of their own, as in the plays: in some samples two, in others ten.
    assert sum(line.endswith(":") and line.isupper() for line in text.splitlines()) >= 12


def prepare_commands(recipe):
    """The arguments of each prepare command in a recipe's docstring."""
    text = (ROOT / "configs" / f"{recipe}.py").read_text()
    commands = re.findall(r"python -m moe_jax\.prepare ((?:.*\\\n)*.*)", text)
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


def shrunk(config, path):
    """``config`` but for its sizes, budget and learning rate: seconds, on the texts at ``path``."""
    model, moe = config.model, config.model.moe
    moe = dataclasses.replace(
        moe,
        expert_dim=32,
        num_experts=min(moe.num_experts, 8),
        top_k=min(moe.top_k, 4),
        num_expert_groups=min(moe.num_expert_groups, 4),
        top_k_groups=min(moe.top_k_groups, 2),
        first_dense=min(moe.first_dense, 1),
    )
    model = dataclasses.replace(
        model,
        context_length=32,
        num_layers=2,
        embed_dim=32,
        num_heads=min(model.num_heads, 8),
        mlp_dim=model.mlp_dim and 32,
        scan_unroll=1,
        moe=moe,
    )
    tokenizer = config.data.tokenizer if config.data.tokenizer in ("char", "gpt2") else "bpe:300"
    data = dataclasses.replace(config.data, path=str(path), tokenizer=tokenizer, val_fraction=0.1, batch_size=16)
    accumulation_steps = min(config.optimizer.accumulation_steps, 2)
    optimizer = dataclasses.replace(
        config.optimizer, learning_rate=1e-2, warmup_steps=5, accumulation_steps=accumulation_steps
    )
    # A vocabulary of fifty thousand, of which the text has twenty, takes longer to rule the others out.
    steps = 120 if tokenizer == "gpt2" else 50
    train = dataclasses.replace(
        config.train,
        num_steps=steps,
        eval_every=steps,
        checkpoint_every=steps,
        log_every=steps // 5,
        keep_epochs=False,  # there would be dozens
    )
    sample = dataclasses.replace(config.sample, max_new_tokens=8)
    return Config(model, data, optimizer, MeshConfig(data=1), train, sample)


def unigram_entropy(data):
    """Of the tokens to train on, in nats: the loss of a model that knows their frequencies and nothing else."""
    streams = [corpus.train.stream() for corpus in data.corpora]
    tokens = np.concatenate([stream.read(0, len(stream)) for stream in streams])
    shares = np.bincount(tokens) / len(tokens)
    shares = shares[shares > 0]
    return float(-np.sum(shares * np.log(shares)))


@pytest.fixture(scope="module")
def folder_of_stories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    for index, story in enumerate(stories(60)):
        (folder / f"{index}.txt").write_text(story)
    return folder


VOCABULARY = {
    "char": 70,
    "gpt2": 50_261,
    None: 2048,
    "bpe:512": 512,
    "data/corpus_32k": 32_000,
    "data/corpus_129k": 129_280,
    "data/five_corpora": 8192,
    "data/tinystories": 2048,
}


@pytest.mark.parametrize("recipe", sorted(file.stem for file in (ROOT / "configs").glob("*.py")))
def test_the_docstring_of_a_recipe_counts_its_parameters(recipe):
    file = ROOT / "configs" / f"{recipe}.py"
    config = check(load_recipe(file))
    decoder = Decoder(on_cpu(config.model), VOCABULARY[config.data.path or config.data.tokenizer])
    params = jax.eval_shape(
        lambda: nn.unbox(decoder.init(jax.random.key(0), Tokens(jnp.zeros((1, 2), jnp.int32)))["params"])
    )
    counts = count_params(params, config.model.moe)
    stated = re.search(r"([\d.]+) M parameters(?:, ([\d.]+) M\s+active)?", " ".join(file.read_text().split()))
    assert stated is not None
    for number, text in zip(counts, stated.groups(), strict=True):
        assert text is None or f"{number / 1e6:.1f}" == text


RECIPES = sorted(file.stem for file in (ROOT / "configs").glob("*.py"))


@pytest.mark.slow  # what recipes are made of has tests of its own
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns_saves_goes_on_and_speaks(recipe, folder_of_stories, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = shrunk(load_recipe(ROOT / "configs" / f"{recipe}.py"), folder_of_stories)
    run = RunDirectory(tmp_path_factory.mktemp(recipe) / "run")
    train(config, run.path)
    (reached,) = [line["val/loss"] for line in read_metrics(run.metrics_file) if "val/loss" in line]
    assert reached <= unigram_entropy(find_or_prepare(config.data, cache_folder("data"))) - 0.3
    steps = config.train.num_steps
    assert saved_steps(run.checkpoints) == [steps]
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=steps + 2))
    train(longer, run.path)
    logged = [line["step"] for line in read_metrics(run.metrics_file)]
    assert logged == [*(steps // 5 * n for n in range(1, 6)), steps, steps + 2, steps + 2]
    assert saved_steps(run.checkpoints) == [steps, steps + 2]
    generator, variables = load_engine(open_run(run.path, "newest"))
    assert len(generator.generate(variables, "the quick", config.sample)) == 1


def test_stories_by_name_are_those_of_the_parquet_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    tinystories_files(tmp_path)
    made = []
    for place, arguments in enumerate(prepare_commands("tinystories")):
        # The hub's name stands for a local data set of the same files.
        arguments = [item.replace("roneneldan/TinyStories", "./TinyStories") for item in arguments]
        config = dataclasses.replace(parse_prepare(arguments), out=str(tmp_path / str(place)))
        made.append(prepare_folder(config))
    assert made[0].fingerprint == made[1].fingerprint


@pytest.mark.parametrize(
    ("recipe", "files", "command"), [("tinystories", tinystories_files, 1), ("five_corpora", five_corpora_files, 0)]
)
def test_the_text_of_a_recipe_is_made_by_its_command(tmp_path, monkeypatch, recipe, files, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files(tmp_path)
    arguments = prepare_commands(recipe)[command]
    if recipe == "five_corpora":
        # Whole plays would take most of this test's time: other text stands for them.
        (tmp_path / "plays.txt").write_text(VERSE * 400)
        arguments = [item.replace("bpe:8192", "bpe:512").replace("=plays:", "=plays.txt") for item in arguments]
    data = prepare_folder(parse_prepare(arguments))
    config = load_recipe(ROOT / "configs" / f"{recipe}.py")
    assert Path(str(config.data.path)).resolve() == data.folder.resolve(), "the recipe reads what its command makes"
    if recipe == "five_corpora":
        assert [corpus.weight for corpus in data.corpora] == [0.2, 0.1, 0.2, 0.2, 0.3]
        counts = [corpus.train.num_documents + corpus.val.num_documents for corpus in data.corpora]
        assert counts == [30, 50, 2, 50, 60], "the held-out end of a single document is one, too"
    else:
        assert (data.tokenizer.delimiters, data.corpora[0].val.num_documents) == ("chat", 9)
