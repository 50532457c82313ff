"""What ``gpu.py`` measures in processes with JAX, stage by stage; not a command of its own.

A stage is a function of the session that yields rows, each as soon as it is known.
"""

import dataclasses
import functools
import gc
import math
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import moe_layer
import sampling
import train_step
from gpu_blocks import sweep
from gpu_parity import parity
from gpu_session import Row, Session, Shape, guarded, seconds_of, text_of

from moe_jax.cli import load_recipe
from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig
from moe_jax.config.rules import check
from moe_jax.training.flops import PEAK_FLOPS

SHAPES: list[Shape] = [(1024, 4096, 8, 2), (2048, 768, 128, 8), (512, 512, 64, 8)]
DATA_SHEET = 989e12
"""bfloat16 operations a second of an H100 or H200, for a device that PEAK_FLOPS does not know."""
RECIPE = Path(__file__).parents[1] / "configs/tinystories_moe_135m.py"


def device(session: Session) -> Iterator[Row]:
    """The machine, and the two ceilings that all else is a share of."""
    import jaxlib

    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    found = jax.devices()[0]
    yield {
        "what": found.device_kind,
        "platform": found.platform,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "driver": driver,
        "memory_gb": round((found.memory_stats() or {}).get("bytes_limit", 0) / 1e9, 1),
    }
    size = 512 if session.tiny else 8192
    left, right = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1))
    seconds = seconds_of(jax.jit(jnp.matmul), (left, right), turns=9)
    session.product_rate = 2 * size**3 / seconds
    yield {"what": f"product of {size}, bfloat16"} | session.speed(seconds, 2 * size**3)
    data = jax.random.normal(jax.random.key(0), (2**22 if session.tiny else 2**29,))
    seconds = seconds_of(jax.jit(jnp.copy), (data,), turns=9)
    yield {"what": "copy", "ms": round(1000 * seconds, 3), "gb_per_second": round(2 * data.nbytes / seconds / 1e9)}


def layers(session: Session, T: int, shapes: list[Shape]) -> Iterator[Row]:
    """Forward, and forward and backward, of one MoE layer in bfloat16 with float32 weights."""
    if session.tiny:
        T, shapes = T // 256, [(64, 32, 8, 2)]
    for shape in shapes:
        case = moe_layer.Case(*shape, T, T, "bfloat16")
        names = ["pallas", "gather, capacity 1.0", "einsum, capacity 1.0"]
        names += ["blocked"] if shape == shapes[-1] and T <= 16384 else []
        names = [name for name in names if not moe_layer.why_not(case, name, math.inf)]
        for name in [*names, "bound"]:
            for index, which in enumerate(("forward", "both")):
                label = f"D={case.D} F={case.F} E={case.E} K={case.K} T={T}, {name}, {which}"
                yield guarded(label, functools.partial(_one_layer, session, case, name, index))


def _one_layer(session: Session, case: moe_layer.Case, name: str, index: int) -> Row:
    """The forward pass (0), or forward and backward (1), of a variant or of the bound, which dispatches nothing."""
    found = moe_layer.passes(case, [] if name == "bound" else [name])
    return session.speed(seconds_of(*found[name][index]), case.operations / (1 if index else 3))


def layer(session: Session) -> Iterator[Row]:
    yield from layers(session, 16384, SHAPES)


def layer_long(session: Session) -> Iterator[Row]:
    yield from layers(session, 65536, SHAPES)


def sparse(num_layers: int, num_heads: int, *, tiny: bool) -> Config:
    """64 experts of half the width, 4 a token, and a shared one: ``torch_moe.py`` has the largest of them too."""
    L, E, head_dim = (64, 8, 16) if tiny else (4096, 64, 128)
    D = num_heads * head_dim
    model = ModelConfig(
        context_length=L,
        num_layers=2 if tiny else num_layers,
        embed_dim=D,
        num_heads=num_heads,
        scan_unroll=2 if tiny else num_layers,  # a loop over layers copies what each keeps: a tenth of a step
        dtype="bfloat16",
        moe=MoEConfig(E, 4, D // 2, num_shared_experts=1),
    )
    return check(Config(model=model, data=DataConfig(batch_size=4 if tiny else 16)))


def stories(tiny: bool) -> Config:
    """The recipe of 134.6 M parameters on rows that are full, without dropout."""
    config = load_recipe(RECIPE)
    config = train_step.with_model(config, None, dropout_rate=0.0, scan_unroll=config.model.num_layers)
    if not tiny:
        return config
    model = {"num_layers": 2, "scan_unroll": 2, "embed_dim": 64, "num_heads": 2, "context_length": 64}
    small = train_step.with_model(config, {"expert_dim": 64}, **model)
    return dataclasses.replace(small, data=dataclasses.replace(small.data, batch_size=4))


def training(session: Session, what: str, config: Config, vocab_size: int) -> Row:
    """A step with the least recomputation, and then the largest microbatches, that fit into memory."""
    remats = ["none", "dots", "full"]
    ways = [(remat, 1) for remat in remats[remats.index(session.remat) :]] + [("full", 2)]
    out_of_memory, row = [], {}
    for remat, factor in ways:
        accumulation = config.optimizer.accumulation_steps * factor
        tried = train_step.with_model(config, None, remat=remat)
        tried = dataclasses.replace(
            tried, optimizer=dataclasses.replace(tried.optimizer, accumulation_steps=accumulation)
        )
        row = guarded(what, functools.partial(_one_training, session, tried, vocab_size))
        row |= {"remat": remat, "accumulation": accumulation, "out_of_memory": out_of_memory}
        gc.collect()  # what the failed or finished step held
        if "RESOURCE_EXHAUSTED" not in row.get("error", "") or time.time() > session.deadline:
            break
        out_of_memory = [*out_of_memory, f"{remat}/{accumulation}"]
    return row


def _one_training(session: Session, config: Config, vocab_size: int) -> Row:
    step = train_step.prepare_step(config, 256 if session.tiny else vocab_size)
    taken = []
    begin = time.perf_counter()
    while len(taken) < (2 if session.tiny else 12) and (len(taken) < 3 or time.perf_counter() - begin < 8):
        start = time.perf_counter()
        step.run()
        taken.append(time.perf_counter() - start)
    seconds = statistics.median(taken)
    full = step.operations / seconds
    causal = (step.operations - step.attention / 2) / seconds
    found = jax.devices()[0]
    sheet = PEAK_FLOPS.get(found.device_kind, DATA_SHEET)
    peak = (found.memory_stats() or {}).get("peak_bytes_in_use", 0)
    settings = dataclasses.asdict(step.model)
    return session.speed(seconds, seconds * causal) | {
        "tokens_per_second": round(config.data.batch_size * config.model.context_length / seconds),
        "mfu_of_measured": session.share(causal),
        "mfu_of_measured_all_keys": session.share(full),
        "mfu_of_sheet": round(causal / sheet, 4),
        "mfu_of_sheet_all_keys": round(full / sheet, 4),
        "program_gb": round(step.program_bytes / 1e9, 2),
        "process_peak_gb": round(peak / 1e9, 2),
        "compile_s": round(step.first_seconds, 1),
        "parameters_m": round(step.num_params / 1e6, 1),
        "dispatch": settings["moe"]["dispatch"],
        "attention": settings.get("attention"),
    }


def train(session: Session) -> Iterator[Row]:
    yield training(session, "14 layers, 10 heads", sparse(14, 10, tiny=session.tiny), 16384)
    yield training(session, "tinystories_moe_135m", stories(session.tiny), 2048)


def ladder(session: Session) -> Iterator[Row]:
    for num_layers, num_heads in [(6, 4)] if session.tiny else [(12, 8), (8, 6), (6, 4)]:
        config = sparse(num_layers, num_heads, tiny=session.tiny)
        yield training(session, f"{num_layers} layers, {num_heads} heads", config, 16384)


def decoding(session: Session) -> Iterator[Row]:
    """Prompts read and tokens drawn by the sampling engine."""
    config = dataclasses.replace(stories(session.tiny), data=DataConfig())
    tokens, batches = (16, [1, 4]) if session.tiny else (256, [1, 32, 128])
    cases = [sampling.Case(config, None, batch, tokens, "bfloat16", 2045, tokens) for batch in batches]
    engine, variables = sampling.model_of(cases[0])
    for case in cases:

        def timed(case: sampling.Case = case) -> Row:
            parts = sampling.parts_of(case, engine, variables)
            taken = [(parts["prefill"](), parts["decode"]()) for _ in range(2 if session.tiny else 4)]
            prefill, decode = (statistics.median(each) for each in zip(*taken[1:], strict=True))  # the first compiles
            return {
                "ms": round(1000 * decode / tokens, 3),
                "tokens_per_second": round(case.batch * tokens / decode),
                "prefill_tokens_per_second": round(case.batch * tokens / prefill),
            }

        yield guarded(f"{case.batch} texts, {tokens} tokens after {tokens}", timed)


STAGES: dict[str, Callable[[Session], Iterator[Row]]] = {
    "device": device,
    "parity": parity,
    "layer": layer,
    "train": train,
    "sweep": lambda session: sweep(session, SHAPES[:2]),
    "sampling": decoding,
    "ladder": ladder,
    "layer_long": layer_long,
}


def run_stages(names: list[str], session: Session, emit: Callable[[Row], None]) -> None:
    """Each stage's rows, and a last one that tells that it is over."""
    for name in names:
        start = time.time()
        if start > session.deadline:
            emit({"stage": name, "skipped": "no time left"})
            continue
        try:
            for row in STAGES[name](session):
                emit({"stage": name} | row)
                if time.time() > session.deadline:
                    emit({"stage": name, "skipped": "the rest, if any: no time left"})
                    break
        except Exception as error:  # noqa: BLE001 - whatever ends a stage, the next one is measured
            emit({"stage": name, "error": text_of(error)})
        gc.collect()
        emit({"stage": name, "seconds": round(time.time() - start, 1), "product_rate": session.product_rate})
