"""python -m moe_jax.estimate: parse the flags, compile a step for devices that need not be here, print its needs."""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from moe_jax.cli import parse_on_recipe
from moe_jax.config import Config
from moe_jax.config.bounds import MANY, Range
from moe_jax.config.rules import check
from moe_jax.errors import UserError

if TYPE_CHECKING:
    from moe_jax.estimate.step import Estimate


@dataclass(frozen=True)
class EstimateCommand:
    """Say what a training needs of each device, before anything runs.

    A step is compiled by the real compiler for as many devices as the mesh has, none of which has to be here
    (mesh sizes of -1 count as 1): memory and whether it fits, operations, exchanges between devices, and two
    estimates of a step's time. For GPUs it needs jax[cuda12] or jax[cuda13], for TPUs jax[tpu].
    """

    config: str
    """Recipe to start from; the flags of train.py change it."""
    device: Literal["h100", "h200", "a100", "v5e", "v5p", "cpu"] = "h100"
    """What the mesh is made of; cpu: simulated devices, without times."""
    vocab_size: int | None = None
    """Tokens of the vocabulary; None: as data.tokenizer says, where it does."""
    json: bool = False
    """Print one JSON object."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def main() -> None:
    command = parse_on_recipe(EstimateCommand, sys.argv[1:], "python -m moe_jax.estimate")
    config = check(command.settings)
    if command.vocab_size is not None:
        Range(1, MANY)("--vocab-size", command.vocab_size)
    vocab_size = command.vocab_size or _vocab_size(config)
    mesh = config.mesh
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "expert": mesh.expert, "tensor": mesh.tensor}
    sizes = {name: max(size, 1) for name, size in sizes.items()}
    os.environ["JAX_PLATFORMS"] = "cpu"  # no device is opened

    from moe_jax.estimate.step import estimate  # loads jax: mistakes were reported before

    found = estimate(config, sizes, command.device, vocab_size)
    print(json.dumps(dataclasses.asdict(found) | {"fits": found.fits}) if command.json else _page(found))


def _vocab_size(config: Config) -> int:
    spec = config.data.tokenizer or ("bpe:2048" if config.data.path is None else None)
    if spec is not None and spec.startswith("bpe:"):
        return int(spec.removeprefix("bpe:"))
    raise UserError(
        f"--vocab-size is needed: data.tokenizer={spec} does not say how many tokens it has; train.py's log does"
    )


def _page(found: "Estimate") -> str:
    mesh = " x ".join(f"{name} {size}" for name, size in found.mesh.items() if size > 1) or "one device"
    lines = [
        f"{found.device}, {mesh}; dispatch by {found.dispatch}",
        f"parameters: {found.parameters:,}, {found.active:,} active for a token",
        "",
        "on each device",
        f"  parameters         {_size(found.parameter_bytes)}",
        f"  optimizer state    {_size(found.moment_bytes)}",
        f"  peak, as compiled  {_size(found.peak_bytes)}" + _of_memory(found),
        f"  operations         {found.model_flops / 1e12:,.2f} TFLOP of the model a step",
        "",
        "exchanged, a step and device",
    ]
    for row in found.exchanged:
        axes = ", ".join(row["axes"])
        times = f"{row['times']} times" if row["times"] > 1 else "once"
        seconds = f", {1e3 * row['seconds']:.2f} ms" if row["seconds"] else ""
        lines.append(f"  {row['kind']} over {axes}: {_size(row['received'])} received, {times}{seconds}")
    if not found.exchanged:
        lines.append("  nothing")
    lines += ["", "largest arrays"] + [f"  {row['array']}  {_size(row['bytes'])}" for row in found.largest]
    if found.slowest:
        from moe_jax.estimate.devices import KINDS

        low, high, peak = found.fastest, found.slowest, found.model_flops / KINDS[found.device].flops
        lines += [
            "",
            f"a step: {1e3 * low:.0f} to {1e3 * high:.0f} ms, MFU {peak / high:.0%} to {peak / low:.0%}: products at "
            "their peak and all exchanges hidden, or products at half of it and none hidden",
        ]
    return "\n".join(lines)


def _of_memory(found: "Estimate") -> str:
    if found.memory is None:
        return ""
    verdict = "fits" if found.fits else "does not fit"
    return f" of {_size(found.memory)}: {verdict}"


def _size(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes:.0f} B"
