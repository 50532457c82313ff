"""The command line: flags over recipes, flags over a run's own settings, and --help."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.cli import load_recipe, parse
from moe_jax.commands.evaluate import EvaluateCommand
from moe_jax.commands.sample import parse_sample
from moe_jax.commands.server import ServerCommand
from moe_jax.commands.train import parse_train
from moe_jax.config import Config, SampleConfig
from moe_jax.config.fields import settings
from moe_jax.errors import UserError
from moe_jax.prepare.settings import parse_prepare

REPOSITORY = Path(__file__).parents[1]
HOME = Path.home()
MOE = str(REPOSITORY / "configs/moe.py")


def test_the_command_line_changes_the_recipe():
    flags = ["--model.moe.num-experts", "16", "--data.batch_size=6", "--optimizer.clip-norm", "None"]
    config, workdir = parse_train(["--config", MOE, *flags])
    assert (config.model.moe.num_experts, config.data.batch_size, config.optimizer.clip_norm) == (16, 6, None)
    assert config.model.qk_norm, "what no flag names is the recipe's"
    assert workdir == Path("runs/moe")
    _, named = parse_train([f"--config={MOE}", "--workdir", "elsewhere"])
    assert named == Path("elsewhere")


def test_a_recipe_out_of_bounds_is_refused_by_its_name(tmp_path):
    recipe = tmp_path / "wide.py"
    recipe.write_text(
        "from moe_jax.config import *\ndef get_config():\n return Config(model=ModelConfig(dropout_rate=2.0))\n"
    )
    with pytest.raises(UserError, match=r"wide\.py: model\.dropout_rate must be in \[0\.0, 0\.99\], got 2\.0"):
        load_recipe(recipe)


def test_sampling_flags_change_the_runs_own_settings():
    of_run = SampleConfig(temperature=0.3, max_new_tokens=7, num_samples=3, top_k=4, stop=("x",))
    flags = ["--prompt", "x", "--top-k", "None", "--stop", "run", "--seed", "run"]
    assert parse_sample(flags).sample_config(of_run) == dataclasses.replace(of_run, top_k=None, stop=("run",))
    assert parse_sample(["--interactive"]).sample_config(of_run).num_samples == 1


@pytest.mark.parametrize(("flags", "number", "is_noted"), [
    ([], 65_536, True), ([], 16, False), (["--num-samples", "50"], 65_536, False), (["--interactive"], 65_536, False)
])  # fmt: skip
def test_many_samples_that_nobody_asked_for_are_announced(capsys, flags, number, is_noted):
    command = parse_sample(flags)
    command.note_what_takes_long(command.sample_config(SampleConfig(num_samples=number)))
    assert ("note: 65,536 samples of a prompt, as the run's settings say" in capsys.readouterr().err) == is_noted


@pytest.mark.parametrize(
    ("parser", "flags", "words"),
    [
        (parse_train, [], "--config is required: name a recipe, such as --config configs/moe.py"),
        (parse_train, ["--config"], "--config is required"),
        (parse_train, ["--config", MOE, "--workdir", "gs://b/run"], "copy the run directory there afterwards"),
        (parse_sample, ["--temperature", "-1"], "--temperature must be at least 0, got -1"),
        (parse_sample, ["--stop-tokens", "1", "-1"], "each of --stop-tokens must be at least 0, got -1"),
        (parse_sample, ["--workdir", ""], "--workdir must name a folder, got '', as of a variable"),
        (parse_sample, ["--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file both say"),
        (parse_sample, ["--interactive", "--prompt", "a"], "and takes no --prompt; leave one of them out"),
        (parse_sample, ["--interactive", "--num-samples", "2"], "--num-samples must be 1 with --interactive, got 2"),
        (EvaluateCommand, ["--data", "s3://b/x"], "--data must be a file or folder of this machine, got s3://b/x"),
        (parse_sample, ["--workdir=~/run"], f"--workdir must be a path without ~, got ~/run; write {HOME}/run"),
        (parse_sample, ["--prompt-file=~/a"], f"--prompt-file must be a path without ~, got ~/a; write {HOME}/a"),
        (parse_prepare, ["--input", "a=~/b", "--out", "c"], "each of --input must be a path without ~, got ~/b"),
        (parse_train, ["--config", MOE, "--data.path=~/b"], "data.path must be a path without ~, got ~/b"),
        (EvaluateCommand, ["--workdir", "gs://b/run"], "mount the bucket, or copy the run directory here first"),
        (ServerCommand, ["--port", "70000"], "--port must be in [0, 65535], got 70000"),
        (ServerCommand, ["--name", "a\nb"], r"--name must be printable text, got 'a\nb'"),
        (parse_prepare, [], "--input is required: name files, folders, globs or hf:DATASET"),
        (parse_prepare, ["--input", "x"], "--out is required: name the folder to write"),
        (parse_prepare, ["--input", "a=s3://b/x", "--out", "o"], "--input must be a file or folder of this machine"),
        (parse_prepare, ["--input", "x", "--out", "o", "--separator", ""], "--separator must have at least one"),
        (parse_prepare, ["--input", "x", "--out", "o", "--max-documents", "0"], "--max-documents must be at least 1"),
        (parse_prepare, ["--input", "x", "--out", "o", "--tokenizer", "bpe:9"], "--tokenizer bpe:VOCAB needs VOCAB"),
    ],
)
def test_a_wrong_flag_is_refused_by_its_name(parser, flags, words):
    with pytest.raises(UserError) as caught:
        parse(parser, flags) if isinstance(parser, type) else parser(flags)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("parser", "flags", "words"),
    [
        (
            parse_prepare,
            ["--input", "a b", "--input=c", "--out", "o"],
            "--input is given twice, as --input 'a b' and ",
        ),
        (parse_prepare, ["--out", "o", "--input", "x", "--out", "o"], "--out is given twice, as --out o and --out o;"),
        (parse_train, ["--config=none.py", "--config", MOE], "--config is given twice, as --config=none.py and --con"),
        (
            parse_train,
            ["--config", MOE, "--data.batch-size", "1", "--data.batch_size", "2"],
            "and --data.batch_size 2",
        ),
        (parse_train, ["--config", MOE, "--train.no-keep-epochs", "--train.keep-epochs"], "--train.keep-epochs is gi"),
        (parse_sample, ["--stop", "a", "--seed", "1", "--stop", "b"], "as --stop a and --stop b; give it once, with"),
        (EvaluateCommand, ["--split", "val", "--split=all"], "--split is given twice, as --split val and --split=all"),
        (ServerCommand, ["--port", "1", "--port", "2"], "--port is given twice"),
    ],
)
def test_a_flag_twice_is_refused_and_both_are_named(parser, flags, words):
    with pytest.raises(UserError) as caught:
        parse(parser, flags) if isinstance(parser, type) else parser(flags)
    assert words in str(caught.value)


@pytest.mark.parametrize(("script", "section"), [("train.py", Config()), ("sample.py", SampleConfig())])
def test_help_explains_every_setting(script, section):
    done = subprocess.run([sys.executable, script, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0
    for name, _, _ in settings(section):
        assert f"--{name.replace('_', '-')}" in done.stdout, name
    assert "Range" not in done.stdout, "bounds leave --help as readable as it is without them"
    source = (REPOSITORY / "moe_jax/config/__init__.py").read_text()
    assert source.count('    """') >= len(list(settings(Config()))), "each setting has its line of explanation"
