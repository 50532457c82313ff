"""What the stages of ``gpu.py`` share: the session's state, rows of a report, and the timing of a call.

``what`` names a row; ``ms``, ``tflops``, ``share`` (of the product rate measured here) and ``tokens_per_second`` mean
the same in all of them.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

Row = dict[str, Any]
Shape = tuple[int, int, int, int]
"""D, F, E, K of a MoE layer."""


@dataclasses.dataclass
class Session:
    tiny: bool
    remat: str
    """What the first attempt of a training step recomputes."""
    deadline: float
    """time.time() at which what is left is left out."""
    product_rate: float | None = None
    """Operations a second of one large bfloat16 product, once it is measured."""

    def share(self, rate: float) -> float | None:
        return None if self.product_rate is None else round(rate / self.product_rate, 3)

    def speed(self, seconds: float, operations: float) -> Row:
        rate = operations / seconds
        return {"ms": round(1000 * seconds, 3), "tflops": round(rate / 1e12, 2), "share": self.share(rate)}


def text_of(error: BaseException) -> str:
    """The type and the first lines, for one line of a report."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def guarded(what: str, measure: Callable[[], Row]) -> Row:
    """A row of what was measured, or of why it could not be: the others of its stage go on."""
    try:
        return {"what": what} | measure()
    except Exception as error:  # noqa: BLE001 - compilers and kernels raise what they like
        return {"what": what, "error": text_of(error)}


def seconds_of(function: Callable, arguments: tuple, *, turns: int = 5, long_enough: float = 0.02) -> float:
    """The median over ``turns`` of a call's time, in runs of so many calls that starting one is hidden by the last."""
    jax.block_until_ready(function(*arguments))

    def run(calls: int) -> float:
        start = time.perf_counter()
        result = None
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    calls = max(1, min(50, math.ceil(long_enough / max(run(1), 1e-6))))
    return statistics.median(run(calls) for _ in range(turns))
