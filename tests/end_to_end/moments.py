"""Sends a signal to this process at a chosen moment of a training run. Used by faulty.py, in a process of its own."""

import functools
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def signal_at(moment: str, number: int = 1, signal_name: str = "SIGKILL", seconds: float = 0.0) -> None:
    """``number`` counts what ``MOMENTS`` says of each moment; the signal comes ``seconds`` after it."""

    def send() -> None:
        if seconds:
            # From a thread, so that it may fall into what comes next, whatever that is.
            threading.Timer(seconds, os.kill, (os.getpid(), signal.Signals[signal_name])).start()
        else:
            os.kill(os.getpid(), signal.Signals[signal_name])

    MOMENTS[moment](number, send)


def hang_at(moment: str, number: int, seconds: float, least_seconds: float = 60.0) -> None:
    """Nothing goes on for ``seconds``; the watchdog waits for ``least_seconds`` instead of a minute."""
    from moe_jax.trackers import watchdog

    watchdog.LEAST_SECONDS = least_seconds

    def hang() -> None:
        latest = time.monotonic() + seconds
        while time.monotonic() < latest:  # a signal does not end it
            time.sleep(0.01)

    MOMENTS[moment](number, hang)


def _at_call(module: str, name: str, number: int, send: Callable[[], None], is_after: bool = False) -> None:
    """Calls ``send`` before, or after, the call of the function with this number, from 1."""
    *path, last = name.split(".")
    owner: Any = functools.reduce(getattr, path, importlib.import_module(module))
    original, calls = getattr(owner, last), []

    @functools.wraps(original)
    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == number and not is_after:
            send()
        result = original(*arguments, **named)
        if len(calls) == number and is_after:
            send()
        return result

    setattr(owner, last, counted)


def _save(number: int, send: Callable[[], None]) -> None:
    """While the arrays are written, once this many files are there; the name is held back until the signal comes."""
    from moe_jax.runs.checkpoint import save as checkpoint

    saves: list[int] = []
    original = checkpoint.Checkpoints.save

    def watched(self: Any, step: int, *arguments: Any, **named: Any) -> None:
        saves.append(step)
        if len(saves) == 2:  # the first one is whole, so that there is something to fall back to
            threading.Thread(target=watch, args=(self._unfinished,), daemon=True).start()
        original(self, step, *arguments, **named)

    def watch(folder: Path) -> None:
        latest = time.monotonic() + 10
        while count(folder) < number and time.monotonic() < latest:
            time.sleep(0.0002)
        send()

    def count(folder: Path) -> int:
        try:
            return sum(item.is_file() for item in folder.rglob("*"))
        except FileNotFoundError:  # what is looked at is moved and removed meanwhile
            return 0

    def held_back(folder: Path) -> None:
        if len(saves) >= 2:
            time.sleep(20)
        seal(folder)

    seal = checkpoint.seal
    checkpoint.Checkpoints.save = watched  # type: ignore[method-assign]
    checkpoint.seal = held_back


def _removal(number: int, send: Callable[[], None]) -> None:
    """When an old checkpoint is about to be removed and has lost its name."""
    from moe_jax.runs.checkpoint import save as checkpoint

    original, calls = checkpoint.shutil.rmtree, []

    def counted(path: Any, **named: Any) -> None:
        if "removed-" in str(path):
            calls.append(1)
            if len(calls) == number:
                send()
        original(path, **named)

    checkpoint.shutil.rmtree = counted  # type: ignore[assignment]


MOMENTS: dict[str, Callable[[int, Callable[[], None]], None]] = {
    "preparation": functools.partial(_at_call, "moe_jax.prepare.cache", "prepare_folder"),
    "compilation": functools.partial(_at_call, "moe_jax.trackers.watchdog", "Watchdog.step_begins"),
    "step": functools.partial(_at_call, "moe_jax.training.loop", "Loop._read"),
    "evaluation": functools.partial(_at_call, "moe_jax.training.evaluate", "put_batch"),
    "save": _save,
    "sealing": functools.partial(_at_call, "moe_jax.runs.checkpoint.save", "seal"),
    "naming": functools.partial(_at_call, "moe_jax.runs.checkpoint.save", "seal", is_after=True),
    "removal": _removal,
}
"""preparation: before that of the text; compilation: before the first step; step: when its output is read;
evaluation: before that batch of all; save: in the second save, once that many files are there; sealing: before that of
that save; naming: after it, when everything is written; removal: of that old checkpoint."""


def not_a_number(first: int, last: int) -> None:
    """The losses and gradients of the optimizer steps from ``first`` to ``last``, counted from 1, are NaN."""
    import numpy as np

    from moe_jax.training import loop, step

    put_batch, summed_loss, calls = loop.put_batch, step._summed_loss, []

    def poisoned(batch: dict[str, Any], mesh: Any) -> dict[str, Any]:
        calls.append(1)
        poison = np.full(len(batch["inputs"]), np.nan if first <= len(calls) <= last else 1.0, np.float32)
        return put_batch({**batch, "poison": poison}, mesh)

    def lost(decoder: Any, variables: Any, batch: dict[str, Any], **named: Any) -> Any:
        loss, output = summed_loss(decoder, variables, batch, **named)
        return (loss * batch["poison"][0] if "poison" in batch else loss), output

    loop.put_batch = poisoned
    step._summed_loss = lost


def space_after_failures(number: int, file: str) -> None:
    """Makes ``file`` once this many saves have failed: what a file_size_limit waits for."""

    def make() -> None:
        Path(file).touch()
        time.sleep(0.2)

    _at_call("moe_jax.runs.checkpoint.save", "Checkpoints._fail", number, make, is_after=True)


FAULTS_OF_A_RUN: dict[str, Callable[..., None]] = {
    "signal_at": signal_at,
    "hang_at": hang_at,
    "not_a_number": not_a_number,
    "space_after_failures": space_after_failures,
}
