"""A folder with a tiny recipe, and the commands of this project run in it with faults."""

import json
import subprocess
import sys

from moe_jax.runs.metrics_file import read_metrics
from tests.compiling import quick_environment
from tests.end_to_end.faulty import ROOT
from tests.oracles.texts import VERSE

RECIPE = """
from moe_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(context_length=16, num_layers=1, embed_dim=16, num_heads=2, dropout_rate=0.1,
                          moe=MoEConfig(num_experts=4, expert_dim=16, router="noisy_top_k")),
        data=DataConfig(path="verse.txt", tokenizer="char", batch_size=4),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        train=TrainConfig(num_steps=40, eval_every=10, checkpoint_every=5, log_every=5),
        sample=SampleConfig(max_new_tokens=20),
    )
"""


def steps_of(run):
    return [line["step"] for line in read_metrics(run.metrics_file)]


def make_home(folder):
    (folder / "verse.txt").write_text(VERSE * 50)
    (folder / "tiny.py").write_text(RECIPE)
    return folder


def train(home, workdir, faults=None, *flags, cache=None):
    """A start of train.py as a process of its own."""
    arguments = ("train.py", "--config", "tiny.py", "--workdir", workdir, *flags)
    return faulty(home, faults or {}, *arguments, cache=cache)


def faulty(home, faults, *arguments, cache=None):
    """Runs ``arguments``, a script or -m and a module and its flags, in ``home`` with the ``faults`` of faulty.py."""
    with start(home, faults, *arguments, cache=cache) as process:
        output, errors = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start(home, faults, *arguments, cache=None):
    """The process of ``faulty``, which goes on by itself."""
    return subprocess.Popen(
        [sys.executable, ROOT / "tests" / "end_to_end" / "faulty.py", json.dumps(faults), *map(str, arguments)],
        cwd=home,
        env=quick_environment(cache or home / "cache"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
