"""How fast are prompts read and tokens drawn, how near to the memory's speed, and against a loop in PyTorch?

    python benchmarks/sampling.py [--batch 1 2 4 8 16 32 64] [--workdir runs/moe] [--dtype bfloat16] [--json]

New parameters of makeMoE's shape, or a run's own, continue prompts of half the context by the package's prefill and
decode, at temperature 0.8 and top-p 0.95. All parts take turns in one process and medians count.

*Bound*: to draw a token for each of B texts, the matrices that every token passes, those of the experts that B tokens
choose where all are equally likely, and the cache have to be read once. So many bytes are streamed in the same turns
(a sum over them), and the share is the streaming's seconds over the decode step's. One token's experts are mostly not
the last one's, so the bytes are each time other ones out of as many as the model has; *share of the same* is against
the same bytes again and again, which lie in its caches.

*PyTorch*: where torch is installed, the same parameters in the loop that comes to mind first: for each token a full
forward pass of the last ones, temperature alone (``torch_decoder.py``). Its logits are compared with ours before.

*Peak* is the largest resident memory of a process that does nothing else.
"""

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from moe_jax.config import Config, ModelConfig, MoEConfig, SampleConfig
from moe_jax.config.rules import check
from moe_jax.errors import UserError, run
from moe_jax.runs.layout import RunDirectory

SHAPE = ("layers", "width", "heads", "experts", "top_k", "expert_width", "context")
SAMPLE = SampleConfig(temperature=0.8, top_p=0.95)


@dataclasses.dataclass(frozen=True)
class Case:
    config: Config
    workdir: str | None
    """Of a trained run; None: new parameters."""
    batch: int
    new_tokens: int
    dtype: Any
    characters: int = 65
    """Of the vocabulary of new parameters: those of Tiny Shakespeare."""
    prompt: int | None = None
    """Tokens; None: half the context."""

    @property
    def prompt_tokens(self) -> int:
        return self.prompt or max(1, self.config.model.context_length // 2)


def cases(arguments: argparse.Namespace) -> list[Case]:
    """One a batch. Raises UserError for a shape that cannot be."""
    if arguments.workdir:
        config = RunDirectory(Path(arguments.workdir)).load_config()
    else:
        moe = MoEConfig(arguments.experts, arguments.top_k, arguments.expert_width)
        model = ModelConfig(
            num_layers=arguments.layers,
            embed_dim=arguments.width,
            num_heads=arguments.heads,
            context_length=arguments.context,
            activation=arguments.activation,
            moe=moe,
        )
        config = check(Config(model=model))
    return [Case(config, arguments.workdir, batch, arguments.new_tokens, arguments.dtype) for batch in arguments.batch]


def model_of(case: Case) -> tuple[Any, Any]:
    """(engine whose texts have no end but their length, its variables)."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from moe_jax.model.decoder import Decoder, Tokens, Variables, initial_expert_bias
    from moe_jax.model.machine import this_machine
    from moe_jax.model.moe.backends import for_machine
    from moe_jax.prepare.tokenizer import build_tokenizer
    from moe_jax.runs.opened import open_run
    from moe_jax.sampling.api import load_variables
    from moe_jax.sampling.engine import Engine

    if case.workdir:
        opened = open_run(Path(case.workdir), "best")
        engine = Engine(opened.config, opened.tokenizer, this_machine(), case.dtype, end_token=-1)
        return engine, engine.prepare(load_variables(opened))
    tokenizer = build_tokenizer("char", ["".join(chr(48 + number) for number in range(case.characters))])
    engine = Engine(case.config, tokenizer, this_machine(), case.dtype, end_token=-1)
    model = for_machine(engine.config, 2, train=False, machine=this_machine(), as_set=False)
    decoder = Decoder(model, tokenizer.vocab_size)
    params = jax.jit(decoder.init)(jax.random.key(0), Tokens(jnp.zeros((1, 2), jnp.int32)))["params"]
    return engine, engine.prepare(Variables(nn.unbox(params), initial_expert_bias(case.config.model)))


def prompts_of(case: Case, vocab_size: int) -> Any:
    """[B, prompt tokens]."""
    import numpy as np

    return np.random.default_rng(0).integers(0, vocab_size, (case.batch, case.prompt_tokens))


def parts_of(case: Case, engine: Any, variables: Any) -> dict[str, Callable[[], float]]:
    """Functions that each take one part's turn and return its seconds."""
    import jax
    import jax.numpy as jnp

    from moe_jax.sampling.batch import Batch

    prompt_BL = prompts_of(case, engine.tokenizer.vocab_size)
    sample = dataclasses.replace(SAMPLE, max_new_tokens=case.new_tokens)
    size = int(bytes_of_step(case, engine, variables) / 4)
    all_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    buffers = [jnp.full(size, float(index)) for index in range(1 + all_bytes // (4 * size))]
    stream = jax.jit(jnp.sum)
    batch = Batch(engine.programs, variables, [case.batch])

    def prefill() -> float:
        texts = [engine.begin(ids.tolist(), sample, number) for number, ids in enumerate(prompt_BL)]
        start = time.perf_counter()
        batch.admit(texts)
        jax.block_until_ready(batch.state)
        return time.perf_counter() - start

    def decode() -> float:
        start = time.perf_counter()
        while batch.texts:
            batch.advance()
        return time.perf_counter() - start

    def streaming(buffers: list[Any]) -> float:
        start = time.perf_counter()
        for turn in range(24):
            stream(buffers[turn % len(buffers)]).block_until_ready()
        return (time.perf_counter() - start) / 24

    return {
        "prefill": prefill,
        "decode": decode,
        "stream": lambda: streaming(buffers),
        "stream_same": lambda: streaming(buffers[:1]),
    }


def bytes_of_step(case: Case, engine: Any, variables: Any) -> float:
    """Bytes that one token for each text has to read."""
    import jax

    from moe_jax.model.attention import init_caches

    moe = engine.config.moe
    # The mean number of experts that B tokens choose, of K each and all equally likely.
    share = 1 - (1 - moe.top_k / moe.num_experts) ** case.batch if moe.num_experts else 1.0
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables.params):
        name = jax.tree_util.keystr(path)
        if "'positions'" in name or ("embedding" in name and not engine.config.tie_embeddings):
            continue  # a row for each text
        routed = "'moe'" in name and "'shared'" not in name and "router" not in name
        total += leaf.nbytes * (share if routed else 1.0)
    caches = jax.eval_shape(lambda: init_caches(engine.config, case.batch, engine.config.context_length))
    return total + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))


def with_torch(case: Case, engine: Any, variables: Any, num_tokens: int) -> Callable[[], float] | None:
    """The PyTorch loop's turn, or None where torch is missing or the model is one that it does not have."""
    if not importlib.util.find_spec("torch"):
        return None
    import jax
    import numpy as np

    from moe_jax.model.decoder import Tokens, forward

    sys.path.insert(0, str(Path(__file__).parent))
    torch_decoder = importlib.import_module("torch_decoder")
    if not torch_decoder.is_of_this_kind(engine.config):
        return None
    prompt_BL = prompts_of(case, engine.tokenizer.vocab_size)
    decoder = engine.programs.decoder_for(prompt_BL.size)
    logits_BLV = np.asarray(jax.jit(lambda ids: forward(decoder, variables, Tokens(ids)).logits_BLV)(prompt_BL))
    draw = torch_decoder.loop(engine.config, variables.params, prompt_BL, logits_BLV, SAMPLE.temperature)

    def turn() -> float:
        start = time.perf_counter()
        draw(num_tokens)
        return time.perf_counter() - start

    return turn


def peak_bytes(case: Case | None) -> int:
    """The largest resident memory of this process once it has drawn a text; without a case, once jax has started."""
    import jax

    if case is None:
        jax.numpy.zeros(1).block_until_ready()
    else:
        parts = parts_of(case, *model_of(case))
        parts["prefill"](), parts["decode"]()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peaks(chosen: list[Case]) -> tuple[int, list[int]]:
    """(bytes of Python and jax alone, peak bytes of each case), each from a process of its own.

    To be called while this process is small: on Linux a new process starts with its parent's size as its peak.
    """
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(peak_bytes, (None,)), [pool.apply(peak_bytes, (case,)) for case in chosen]


def measure(chosen: list[Case], rounds: int, torch_tokens: int) -> list[dict[str, float]]:
    """The median seconds of each part of each case, and the bytes that its step reads."""
    engine, variables = model_of(chosen[0])
    parts = [parts_of(case, engine, variables) for case in chosen]
    for case, each in zip(chosen, parts, strict=True):
        turn = with_torch(case, engine, variables, torch_tokens) if torch_tokens else None
        if turn is not None:
            each["torch"] = turn
    taken: list[dict[str, list[float]]] = [{name: [] for name in each} for each in parts]
    for turn_number in range(rounds + 1):  # the first compiles
        for times, each in zip(taken, parts, strict=True):
            for name, part in each.items():
                seconds = part()
                if turn_number:
                    times[name].append(seconds)
    read = [bytes_of_step(case, engine, variables) for case in chosen]
    return [
        {name: statistics.median(each) for name, each in times.items()} | {"bytes": size}
        for times, size in zip(taken, read, strict=True)
    ]


def row_of(case: Case, seconds: dict[str, float], peak: int, torch_tokens: int) -> dict[str, Any]:
    step = seconds["decode"] / case.new_tokens
    torch_step = seconds["torch"] / torch_tokens if "torch" in seconds else None
    return {
        "batch": case.batch,
        "prefill_tokens_per_second": round(case.batch * case.prompt_tokens / seconds["prefill"]),
        "decode_tokens_per_second": round(case.batch / step),
        "bound_tokens_per_second": round(case.batch / seconds["stream"]),
        "share_of_bound": round(seconds["stream"] / step, 2),
        "share_of_the_same": round(seconds["stream_same"] / step, 2),
        "bytes_mb": round(seconds["bytes"] / 1e6, 1),
        "stream_gb_per_second": round(seconds["bytes"] / seconds["stream"] / 1e9, 1),
        "torch_tokens_per_second": round(case.batch / torch_step) if torch_step else None,
        "ratio_to_torch": round(torch_step / step, 1) if torch_step else None,
        "peak_mb": round(peak / 1e6),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name, default in zip(SHAPE, (8, 128, 8, 8, 2, 512, 32), strict=True):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--activation", default="relu", choices=["relu", "gelu", "swiglu"])
    parser.add_argument("--workdir", help="a trained run, whose shape and parameters are taken")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the model's")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="texts at a time")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--torch-tokens", type=int, default=64, help="tokens of the PyTorch loop a turn; 0: none")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every part")
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    arguments = parser.parse_args()
    for name in ("batch", "new_tokens", "rounds"):
        value = getattr(arguments, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {value}; raise it")
    changed = [name for name in (*SHAPE, "activation") if getattr(arguments, name) != parser.get_default(name)]
    if arguments.workdir and changed:
        flag = "--" + changed[0].replace("_", "-")
        raise UserError(f"--workdir takes the shape of its run, got {flag} too; leave one of them out")
    return arguments


def main() -> None:
    arguments = parse()
    chosen = cases(arguments)
    alone, peak = peaks(chosen)
    measured = measure(chosen, arguments.rounds, arguments.torch_tokens)
    rows = [
        row_of(case, seconds, size, arguments.torch_tokens)
        for case, seconds, size in zip(chosen, measured, peak, strict=True)
    ]
    if arguments.json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    case, model = chosen[0], chosen[0].config.model
    print(f"{model.num_layers} layers of width {model.embed_dim}, context {model.context_length}; ", end="")
    print(f"{case.new_tokens} new tokens after {case.prompt_tokens}; Python and jax alone: {alone / 1e6:.0f} MB\n")
    columns = (
        "batch",
        "prefill tokens/s",
        "decode tokens/s",
        "bound",
        "share",
        "share of the same",
        "MB a step",
        "GB/s streamed",
    )
    print("| " + " | ".join((*columns, "PyTorch tokens/s", "ratio", "peak, MB")) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join("" if value is None else str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    run(main)
