"""fit calls its observers at fixed moments, in order."""

import pytest

from moe_jax.prepare.cache import find_or_prepare
from moe_jax.runs.checkpoint.save import Checkpoints, Retention
from moe_jax.runs.metrics_file import MetricsFile
from moe_jax.sharding.mesh import use_mesh
from moe_jax.training.loop import fit
from moe_jax.training.observers import Observer
from moe_jax.training.signals import StopRequest
from moe_jax.training.train import resolve, restore_or_init
from tests.oracles.texts import VERSE
from tests.tiny import CONFIG, arrays, change, steps_of


class Recorder(Observer):
    """Notes what it is called with; asks for a stop once it has read the step ``stop_after``."""

    def __init__(self, calls, name="", request=None, stop_after=None):
        self._calls, self._name, self._request, self._stop_after = calls, name, request, stop_after

    def _note(self, moment):
        self._calls.append(self._name + moment)

    def step_begins(self, step, state):
        assert int(state.step) == step
        self._note(f"step {step} begins")

    def step_read(self, done, output):
        self._note(f"step {done} read, loss {float(output.loss) > 0}")
        if done == self._stop_after:
            self._request.ask(143)

    def step_ends(self, done):
        self._note(f"step {done} ends")

    def line(self, done, values, load_NE=None):
        kind = "validation" if "val/loss" in values else "training"
        self._note(f"line {done} of {kind}, load {None if load_NE is None else load_NE.shape}")

    def evaluation_begins(self):
        self._note("evaluation begins")

    def evaluated(self, done, variables):
        self._note(f"evaluated {done}")


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Of four steps, with a save at the second, and a save and an evaluation at the last."""
    folder = tmp_path_factory.mktemp("fit")
    (folder / "verse.txt").write_text(VERSE * 50)
    steps = {"num_steps": 4, "eval_every": 4, "checkpoint_every": 2, "log_every": 2}
    config = change(
        CONFIG, data={"path": str(folder / "verse.txt")}, optimizer={"warmup_steps": 1}, train=steps, mesh={"data": 1}
    )
    return resolve(config, lambda: find_or_prepare(config.data, folder / "cache"), folder / "run")


def fit_here(setup, folder, observers, request, calls):
    with use_mesh(setup.mesh), Checkpoints(folder / "checkpoints", None, Retention(9, 1)) as checkpoints:
        save = checkpoints.save
        checkpoints.save = lambda record, items: (calls.append(f"save {record.step}"), save(record, items))
        start = restore_or_init(setup, checkpoints)
        setup.run.path.mkdir(exist_ok=True)
        with MetricsFile(setup.run, None) as metrics:
            return fit(setup, start, checkpoints, metrics, observers, request)


def test_observers_are_called_at_each_moment_in_order(setup, tmp_path):
    calls = []
    state = fit_here(setup, tmp_path, [Recorder(calls)], StopRequest(), calls)
    assert calls == [
        # The host reads a step while the device computes the next one; a start's first step compiles and has no end.
        *("step 0 begins", "step 1 begins", "step 1 read, loss True", "step 2 read, loss True", "step 2 ends"),
        *("line 2 of training, load (1, 4)", "save 2", "step 2 begins", "step 3 ends", "step 3 begins"),
        *("step 3 read, loss True", "step 4 read, loss True", "step 4 ends", "line 4 of training, load (1, 4)"),
        *("evaluation begins", "line 4 of validation, load None", "evaluated 4", "save 4"),
    ]
    assert int(state.step) == 4
    assert steps_of(setup.run.path) == [2, 4, 4]


def test_an_observer_that_is_first_is_called_first_and_a_request_ends_the_run_after_its_step(setup, tmp_path):
    calls, request = [], StopRequest()
    observers = [Recorder(calls, "one: "), Recorder(calls, "two: ", request, stop_after=1)]
    state = fit_here(setup, tmp_path, observers, request, calls)
    assert calls[:4] == ["one: step 0 begins", "two: step 0 begins", "one: step 1 begins", "two: step 1 begins"]
    assert calls[-1] == "save 2"
    assert int(state.step) == 2
    assert arrays(tmp_path)
