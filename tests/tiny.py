"""Training runs of seconds: one configuration, its files, and real processes that train it."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, SampleConfig, TrainConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokenizer_file import fingerprint, save_tokenizer
from moe_jax.errors import Interrupted
from moe_jax.model.decoder import Decoder, Tokens, Variables
from moe_jax.prepare.tokenizer import build_tokenizer
from moe_jax.runs.checkpoint.record import Record
from moe_jax.runs.checkpoint.save import Checkpoints, Retention
from moe_jax.runs.layout import RunDirectory, saved_steps
from moe_jax.runs.metrics_file import read_metrics
from moe_jax.training.loop import Loop
from moe_jax.training.state import random_record
from moe_jax.training.train import Progress
from tests.compiling import quick_environment
from tests.oracles.moe import on_cpu
from tests.oracles.texts import VERSE

ROOT = Path(__file__).parents[1]
CONFIG = Config(
    model=ModelConfig(
        context_length=16,
        num_layers=1,
        embed_dim=16,
        num_heads=2,
        dropout_rate=0.1,
        moe=MoEConfig(num_experts=4, expert_dim=16, router="noisy_top_k"),
    ),
    data=DataConfig(path="verse.txt", tokenizer="char", batch_size=4),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
    train=TrainConfig(num_steps=40, eval_every=10, checkpoint_every=5, log_every=5),
    sample=SampleConfig(max_new_tokens=20),
)
"""Noise and dropout, so that a run that goes on has to draw again what it drew."""


def change(config: Config, moe: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    """``config`` with some fields of some sections replaced: change(config, train={"num_steps": 3})."""
    if moe is not None:
        sections["model"] = {"moe": dataclasses.replace(config.model.moe, **moe)} | sections.get("model", {})
    replaced = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **replaced)


def recipe(config: Config) -> str:
    """The text of a recipe that returns ``config``."""
    return f"from moe_jax.config import *\n\n\ndef get_config():\n    return {config!r}\n"


def make_home(folder: Path, config: Config = CONFIG) -> Path:
    """``folder`` with verse.txt and the recipe tiny.py."""
    (folder / "verse.txt").write_text(VERSE * 50)
    (folder / "tiny.py").write_text(recipe(config))
    return folder


def write_run(
    folder: Path,
    config: Config,
    losses: tuple[float, ...] = (3.0,),
    data_fingerprint: str = "0",
    tokenizer: Tokenizer | None = None,
) -> RunDirectory:
    """A run as a training would leave it, without one: new parameters for each validation loss, of steps 2, 4, ..."""
    run, tokenizer = RunDirectory(folder), tokenizer or build_tokenizer("char", [VERSE])
    config = change(config, optimizer={"decay_steps": config.train.num_steps})
    decoder = Decoder(on_cpu(config.model), tokenizer.vocab_size)
    initialise = jax.jit(lambda key: nn.unbox(decoder.init(key, Tokens(jnp.zeros((1, 2), jnp.int32))))["params"])
    folder.mkdir(parents=True)
    run.save_config(config)
    save_tokenizer(tokenizer, run.tokenizer)
    (folder / ".lock").touch()
    remembered = {"random": random_record(config.train.seed), "config": config.to_dict()}
    remembered["tokenizer"] = fingerprint(tokenizer)
    progress = dataclasses.asdict(Progress(data_fingerprint))
    with Checkpoints(run.checkpoints, None, Retention(newest=len(losses), best=1)) as checkpoints:
        for number, loss in enumerate(losses, start=1):
            record = Record(step=2 * number, val_loss=loss, progress=progress, **remembered)
            checkpoints.save(record, Variables(initialise(jax.random.key(number))).to_items())
    return run


# What a run left


def arrays(workdir: Path, *items: str, step: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by their paths: of all its items, or of those named; None: of the newest."""
    checkpoints = RunDirectory(workdir).checkpoints
    folder = checkpoints / str(saved_steps(checkpoints)[-1] if step is None else step)
    found = [name for name in items or ("params", "router_state", "optimizer_state") if (folder / name).exists()]
    with ocp.StandardCheckpointer() as checkpointer:
        restored = {name: checkpointer.restore(folder / name) for name in found}
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def logged(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on a clock."""
    lines = read_metrics(RunDirectory(workdir).metrics_file)
    return [{name: value for name, value in line.items() if not name.endswith("_per_second")} for line in lines]


def steps_of(workdir: Path) -> list[int]:
    return [line["step"] for line in logged(workdir)]


def assert_same_arrays(workdir: Path, straight: Path) -> None:
    """Both ended with the same bits in every parameter, router state and moment."""
    got, want = arrays(workdir), arrays(straight)
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@contextlib.contextmanager
def stop_at(step: int, number: int = signal.SIGTERM) -> Iterator[None]:
    """Within it a training of this process is sent the signal once it has read ``step``, and is interrupted by it."""
    read, sent = Loop._read, []

    def then_stop(loop: Loop, output: Any, done: int) -> None:
        read(loop, output, done)
        if done == step and not sent:  # a second signal would be the end of this process
            sent.append(done)
            os.kill(os.getpid(), number)

    with mock.patch.object(Loop, "_read", then_stop), pytest.raises(Interrupted) as caught:
        yield
    assert caught.value.exit_code == 128 + number


# Real processes


def start(home: Path, *arguments: Any, faults: dict | None = None, cache: Path | None = None, **options: Any):
    """A process in ``home`` that runs a script of this project, or -m and a module, with the ``faults`` of faulty.py.

    ``options`` are those of Popen.
    """
    program, *flags = map(str, arguments)
    if faults is not None:
        command = [ROOT / "tests" / "end_to_end" / "faulty.py", json.dumps(faults), program, *flags]
    else:
        command = [program if program.startswith("-") else ROOT / program, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = quick_environment(cache or home / "cache") | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *command], cwd=home, **{"env": environment, **pipes, **options})


def command(home: Path, *arguments: Any, stdin: str | bytes = "", **options: Any) -> subprocess.CompletedProcess:
    """The end of the process of ``start``."""
    with start(home, *arguments, stdin=subprocess.PIPE, **options) as process:
        output, errors = process.communicate(stdin, timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def train(home: Path, workdir: Path | str, *flags: Any, **options: Any) -> subprocess.CompletedProcess:
    """A start of train.py with the recipe of ``home``."""
    return command(home, "train.py", "--config", "tiny.py", "--workdir", workdir, *flags, **options)
