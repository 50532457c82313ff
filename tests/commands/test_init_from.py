"""A new run from the parameters of another one. (What is refused is in tests/training/test_resolve.py.)"""

import shutil

import jax
import numpy as np
import pytest

from moe_jax.commands.training import train
from moe_jax.errors import UserError
from moe_jax.runs.layout import RunDirectory
from moe_jax.training.loop import Loop
from tests import tiny as runs
from tests.oracles.texts import VERSE
from tests.tiny import arrays, write_run


@pytest.fixture(scope="module")
def source(small, tmp_path_factory):
    """A run whose best checkpoint is not its newest one."""
    return write_run(tmp_path_factory.mktemp("runs") / "source", small(), losses=(3.0, 5.0))


def test_a_new_run_begins_with_the_best_parameters_of_another_and_goes_on_without_it(
    source, small, tmp_path, monkeypatch, capsys
):
    (tmp_path / "verse.txt").write_text(VERSE.replace("quick", "kciuq") * 80)
    begun, original = [], Loop.run

    def run(self):
        begun.extend(jax.device_get(jax.tree.leaves(self.state.variables)))
        return original(self)

    monkeypatch.setattr(Loop, "run", run)
    copy, tuned = RunDirectory(tmp_path / "copy"), RunDirectory(tmp_path / "tuned")
    shutil.copytree(source.path, copy.path)
    config = small(
        # Other text of the same characters, another rate; a GPU's option, which XLA knows on a CPU too.
        data={"path": str(tmp_path / "verse.txt")},
        optimizer={"learning_rate": 1e-3},
        train={"num_steps": 1, "init_from": str(copy.path), "deterministic": True},
    )
    train(config, tuned.path)
    assert "parameters are those of the best checkpoint of" in capsys.readouterr().out
    best, newest = (list(arrays(copy.path, step=step).values()) for step in (2, 4))
    for got, expected in zip(begun, best, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert np.any(newest[0] != best[0])
    shutil.rmtree(copy.path)  # from here on it goes on without
    with pytest.raises(UserError, match=r"train.init_from was .*copy, now elsewhere"):
        train(runs.change(config, train={"init_from": "elsewhere"}), tuned.path)
    train(config, tuned.path)
    assert "is finished: 1 steps are done" in capsys.readouterr().out
