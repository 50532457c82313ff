"""What does a MoE layer cost, by dispatcher and grouped product, against experts on rows that need no dispatch?

    python benchmarks/moe_layer.py [--tokens 2048 8192] [--shapes 128,512,8,2] [--dtype bfloat16] [--json]

A shape is D,F,E,K. Every variant routes from given scores, dispatches, computes swiglu experts and combines; its
backward pass gives the gradients of tokens, scores and weights. The *bound* is the experts' part alone: the same MLP
on rows that already lie grouped, [E, R/E, D], and *products* are the matrix products of that, with nothing between.
All variants of a case take turns in one process, and medians count. Memory is what the compiled forward and backward
pass asks for beside arguments and results, over the bound's own.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from moe_jax.commands.startup import use_huge_pages
from moe_jax.config import MoEConfig
from moe_jax.errors import UserError, run

GROUP = 256
SHAPES = ["128,512,8,2", "256,1024,8,2", "512,512,64,8", "1024,4096,8,2"]
VARIANTS: dict[str, dict[str, Any]] = {
    "einsum, capacity 1.0": {"dispatch": "einsum", "capacity_factor": 1.0},
    "gather, capacity 1.0": {"dispatch": "gather", "capacity_factor": 1.0},
    "gather, dropless": {"dispatch": "gather"},
    "blocked": {"dispatch": "blocked"},
    "ragged": {"dispatch": "ragged"},
    "pallas": {"dispatch": "pallas"},
    "by_row": {"dispatch": "by_row"},
}
# One fully dropless pair of fine-grained and of coarse experts: the same D, K·F and so the same active operations.
FINE, COARSE = "512,512,64,8", "512,2048,8,2"


@dataclasses.dataclass(frozen=True)
class Case:
    D: int
    F: int
    E: int
    K: int
    T: int
    """Tokens in all."""
    group: int
    """Tokens of one group."""
    dtype: str

    def __str__(self) -> str:
        return f"D={self.D} F={self.F} E={self.E} K={self.K}, T={self.T} in groups of {self.group}, {self.dtype}"

    @property
    def operations(self) -> int:
        """Of the forward and backward pass, on rows that were sent."""
        return 18 * self.T * self.K * self.D * self.F


Pass = tuple[Any, tuple]
"""A compiled function and its arguments; a closed-over array would be a constant, and be routed while compiling."""


def parse_shape(text: str) -> tuple[int, int, int, int]:
    try:
        D, F, E, K = map(int, text.split(","))
    except ValueError as error:
        raise UserError(f"--shapes takes D,F,E,K, such as 128,512,8,2; got {text!r}") from error
    if min(D, F, E, K) < 1 or K > E:
        raise UserError(f"--shapes needs positive numbers and K at most E, got {text!r}; change it")
    return D, F, E, K


def cases(shapes: list[str], tokens: list[int], groups: str, dtype: str) -> Iterator[Case]:
    """Each shape and number of tokens, in one group and, where there are several, in groups of ``GROUP``."""
    for shape in map(parse_shape, shapes):
        for T in tokens:
            if groups in ("one", "both") or T <= GROUP:
                yield Case(*shape, T, T, dtype)
            if groups in ("256", "both") and T > GROUP and T % GROUP == 0:
                yield Case(*shape, T, GROUP, dtype)


def why_not(case: Case, name: str, budget: float) -> str | None:
    """Why a variant is left out of a case: ``budget`` is the most operations of one pass."""
    import jax

    platform, dense = jax.default_backend(), case.operations * case.E / case.K
    C = -(-case.group * case.K // case.E)
    if name == "pallas" and platform != "gpu":
        return "no GPU for its kernels"
    if name.startswith("einsum") and case.T * case.K * max(case.E, C) * 4 + case.T * case.E * C * 8 > 2**31:
        return "its masks take more than 2 GiB"
    if name.startswith("einsum") and case.operations + 8 * case.T * case.E * C * case.D > budget:
        return "its masks take too many multiplications"
    if name == "by_row" and 12 * case.T * case.K * case.D * case.F > 2**30:
        return "it gathers more than 1 GiB of weights"
    if name == "ragged" and platform != "tpu" and 32 * case.E * case.T * case.K * max(case.D, case.F) > 2**32:
        return "its masked copies of the rows take more than 4 GiB"
    if (name == "gather, dropless" or (name == "ragged" and platform != "tpu")) and dense > budget:
        return "every expert on every token takes too many multiplications"
    return "too many multiplications" if case.operations > 8 * budget else None


def passes(case: Case, names: list[str]) -> dict[str, tuple[Pass, Pass]]:
    """(forward, forward and backward) of the bound, of its products and of each variant."""
    import jax

    from moe_jax.model.mlp import ExpertWeights, expert_mlp
    from moe_jax.model.moe.backends import BACKENDS
    from moe_jax.model.moe.routing import expert_capacity, top_k_plan

    D, F, E, K, R = case.D, case.F, case.E, case.K, case.T * case.K
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape: int, dtype: str = case.dtype) -> Any:
        return jax.random.normal(next(keys), shape, dtype) / shape[-1] ** 0.5

    weights = ExpertWeights(*(normal(*shape, dtype="float32") for shape in ((E, D, F), (E, F, D), (E, D, F))))
    active = jax.tree.map(lambda leaf: leaf[: min(E, R)], weights)  # fewer rows than experts: one row each
    x_ERD = normal(min(E, R), max(1, R // E), D)
    x_GTD = normal(case.T // case.group, case.group, D)
    logits_GTE = normal(case.T // case.group, case.group, E, dtype="float32") * E**0.5

    def products(weights: ExpertWeights, x_ERD: Any, h_ERF: Any) -> tuple:
        cast = jax.tree.map(lambda leaf: leaf.astype(x_ERD.dtype), weights)
        return x_ERD @ cast.w_up_EDF, x_ERD @ cast.w_gate_EDF, h_ERF @ cast.w_down_EFD

    def both(function: Callable) -> Callable:
        def forward_and_backward(cotangent: Any, *arguments: Any) -> tuple:
            y, vjp = jax.vjp(function, *arguments)
            return y, vjp(cotangent)

        return forward_and_backward

    def pair(function: Callable, *arguments: Any) -> tuple[Pass, Pass]:
        shapes = jax.eval_shape(function, *arguments)
        cotangent = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape, leaf.dtype), shapes)
        return (jax.jit(function), arguments), (jax.jit(both(function)), (cotangent, *arguments))

    def layer(moe: MoEConfig) -> Callable:
        capacity = expert_capacity(moe, case.group, train=True)

        def apply(weights: ExpertWeights, x_GTD: Any, logits_GTE: Any) -> Any:
            plan = jax.vmap(lambda logits_TE: top_k_plan(logits_TE, K))(logits_GTE)
            return BACKENDS[moe.dispatch].run(x_GTD, plan, weights, "swiglu", capacity)[0]

        return apply

    found = {
        "bound": pair(lambda weights, x_ERD: expert_mlp(weights, x_ERD, "swiglu"), active, x_ERD),
        "products": pair(products, active, x_ERD, normal(*x_ERD.shape[:2], F)),
    }
    for name in names:
        moe = MoEConfig(num_experts=E, top_k=K, expert_dim=F, **VARIANTS[name])
        found[name] = pair(layer(moe), weights, x_GTD, logits_GTE)
    return found


def median_seconds(timed: dict[str, Pass], rounds: int, seconds: float) -> dict[str, float]:
    """The median of ``rounds`` turns of each, or of as many as fit into ``seconds`` but three at least."""
    import jax

    taken: dict[str, list[float]] = {name: [] for name in timed}
    for function, arguments in timed.values():  # compiles, which counts in no budget
        jax.block_until_ready(function(*arguments))
    begin = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, (function, arguments) in timed.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in taken.items()}


def temporary_bytes(function: Any, arguments: tuple) -> int:
    return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def measure(case: Case, names: list[str], rounds: int, seconds: float) -> list[dict]:
    """One row for the bound, its products and each variant."""
    found = passes(case, names)
    forward = median_seconds({name: each[0] for name, each in found.items()}, rounds, seconds)
    total = median_seconds({name: each[1] for name, each in found.items()}, rounds, seconds)
    bound_bytes = temporary_bytes(*found["bound"][1])
    return [
        {
            "case": str(case),
            "variant": name,
            "forward_ms": round(1000 * forward[name], 3),
            "forward_of_bound": round(forward[name] / forward["bound"], 2),
            "both_ms": round(1000 * total[name], 3),
            "both_of_bound": round(total[name] / total["bound"], 2),
            "both_of_products": round(total[name] / total["products"], 2),
            "memory_of_bound": round(temporary_bytes(*found[name][1]) / max(1, bound_bytes), 2),
        }
        for name in found
    ]


def granularity(T: int, dtype: str, rounds: int, seconds: float) -> dict:
    """Forward and backward of 64 experts over that of 8 with equal active operations, in turns."""
    name = "blocked"
    timed = {shape: passes(Case(*parse_shape(shape), T, T, dtype), [name])[name][1] for shape in (FINE, COARSE)}
    median = median_seconds(timed, rounds, seconds)
    return {"T": T, "fine": FINE, "coarse": COARSE, "ratio": round(median[FINE] / median[COARSE], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512, 2048, 8192])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="D,F,E,K")
    parser.add_argument("--groups", choices=["one", "256", "both"], default="both")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=15, help="turns of every variant")
    parser.add_argument("--seconds", type=float, default=8.0, help="begin no further turn of a case after these")
    parser.add_argument("--budget", type=float, default=2e12, help="operations past which padding is not computed")
    parser.add_argument("--no-granularity", action="store_true", help="without the comparison of 64 with 8 experts")
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    arguments = parser.parse_args()
    if min(arguments.tokens) < 1:
        raise UserError(f"--tokens must be positive, got {min(arguments.tokens)}; name numbers of tokens")
    if arguments.rounds < 1:
        raise UserError(f"--rounds must be positive, got {arguments.rounds}; name a number of turns")
    chosen = list(cases(arguments.shapes, arguments.tokens, arguments.groups, arguments.dtype))
    if not chosen:
        raise UserError(f"--groups 256 takes --tokens up to {GROUP} or multiples of it, got {arguments.tokens}")
    use_huge_pages()
    for case in chosen:
        skipped = {name: why for name in arguments.variants if (why := why_not(case, name, arguments.budget))}
        names = [name for name in arguments.variants if name not in skipped]
        rows = measure(case, names, arguments.rounds, arguments.seconds)
        if arguments.json:
            rows += [{"case": str(case), "variant": name, "skipped": why} for name, why in skipped.items()]
            print("\n".join(json.dumps(row) for row in rows), flush=True)
            continue
        print(f"\n{case}\n\n| variant | forward ms | of bound | both ms | of bound | of products | memory |")
        print("|---|---|---|---|---|---|---|")
        for row in rows:
            print("| " + " | ".join(str(value) for value in list(row.values())[1:]) + " |", flush=True)
        for name, why in skipped.items():
            print(f"| {name} | - | - | - | - | - | {why} |", flush=True)
    for T in () if arguments.no_granularity else [T for T in arguments.tokens if T >= 2048]:
        row = granularity(T, arguments.dtype, arguments.rounds, arguments.seconds)
        print(json.dumps(row) if arguments.json else f"\n64 experts over 8, {row}", flush=True)


if __name__ == "__main__":
    run(main)
