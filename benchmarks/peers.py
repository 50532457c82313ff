"""How fast, how large and how good beside what a user would pick instead: transformers' Mixtral, a loop in PyTorch?

    pip install -e '.[parity]' && python benchmarks/peers.py [--only 'context 128' ...] [--rounds 9] [--json]

*Training*: one optimizer step of equal shape, batch and losses, dropless, on the same rows of the embedded plays:
cross-entropy and, beside Mixtral, its balancing loss at 0.01; AdamW at a rate of 1e-3, gradients clipped at 1. Mixtral
has SDPA and its default experts; the loop over experts (``torch_peers.py``) is what a small repository does.
*Sampling*: texts of 64 tokens after prompts of 64, at temperature 0.8 and top-p 0.95, by our engine and by the cached
``generate`` of transformers, with new parameters.

Each peer is a process of its own, which waits for its turn: they share no threads and no memory. Every round gives
each peer the same number of steps; medians count. *Loss* is the mean over the last quarter of the steps, which all
have seen the same tokens. *Peak* is the process's largest resident memory.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from moe_jax.commands.startup import use_huge_pages
from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig
from moe_jax.config.rules import check
from moe_jax.errors import UserError, run
from moe_jax.files import cache_folder

NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Case:
    peers: tuple[str, ...]
    """The first is what the others are a ratio of."""
    batch: int = 8
    context: int = 128
    layers: int = 4
    heads: int = 4
    experts: int = 8
    expert_dim: int = 256
    activation: str = "swiglu"
    balancing: float = 0.01
    tokenizer: str = "bpe:2048"
    samples: bool = False

    @property
    def config(self) -> Config:
        """Ours, of that shape."""
        moe = MoEConfig(
            self.experts,
            expert_dim=self.expert_dim,
            load_balancing_weight=self.balancing,
            load_balancing_scope="batch",
            router_z_weight=0.0,
        )
        model = ModelConfig(
            context_length=self.context,
            num_layers=self.layers,
            num_heads=self.heads,
            tie_embeddings=False,
            activation=self.activation,  # pyrefly: ignore[bad-argument-type]
            scan_unroll=self.layers,
            moe=moe,
        )
        optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0)
        return check(Config(model, DataConfig(tokenizer=self.tokenizer, batch_size=self.batch), optimizer))


MIXTRAL = ("ours", "mixtral")
CASES = {
    "context 128": Case((*MIXTRAL, "dense")),
    "context 1024": Case(MIXTRAL, batch=1, context=1024),
    "context 2048": Case(MIXTRAL, batch=1, context=2048),
    "32 experts": Case(MIXTRAL, experts=32),
    "128 experts": Case(MIXTRAL, experts=128),
    "makeMoE's shape": Case(
        ("ours", "loop"),
        batch=16,
        context=32,
        layers=8,
        heads=8,
        expert_dim=512,
        activation="relu",
        balancing=0.0,
        tokenizer="char",
    ),
    "sampling, 1 text": Case(MIXTRAL, batch=1, samples=True),
    "sampling, 32 texts": Case(MIXTRAL, batch=32, samples=True),
}

Turn = Callable[[], float | None]
"""One step, or one batch of texts; the loss where there is one."""


def batches_of(case: Case) -> tuple[int, Iterator[dict[str, Any]]]:
    """The size of the vocabulary, and the training batches."""
    from moe_jax.data.batches import train_batches
    from moe_jax.prepare.cache import find_or_prepare

    dataset = find_or_prepare(case.config.data, cache_folder("data"))
    return dataset.tokenizer.vocab_size, train_batches(dataset, case.config.data, case.context)


def ours(case: Case, *, is_dense: bool = False) -> Turn:
    import jax

    from moe_jax.model.decoder import Decoder
    from moe_jax.model.machine import this_machine
    from moe_jax.model.moe.backends import for_machine
    from moe_jax.sharding.mesh import make_mesh, put_batch, use_mesh
    from moe_jax.training.optimizer import make_optimizer, make_schedule
    from moe_jax.training.state import init_state
    from moe_jax.training.step import train_step

    config = case.config
    if is_dense:
        moe = dataclasses.replace(config.model.moe, num_experts=0)
        config = check(dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe)))
    if case.samples:
        sampling = importlib.import_module("sampling")
        theirs = sampling.Case(config, None, case.batch, NEW_TOKENS, None, characters=2000)
        parts = sampling.parts_of(theirs, *sampling.model_of(theirs))

        def sample() -> None:
            parts["prefill"](), parts["decode"]()

        return sample
    vocab_size, batches = batches_of(case)
    model = for_machine(config.model, case.batch * case.context, train=True, machine=this_machine())
    decoder, mesh = Decoder(model, vocab_size), make_mesh(config.mesh, config.model, case.batch)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 1))
    with use_mesh(mesh):
        held = [init_state(decoder, optimizer, mesh, 0)]
    step = jax.jit(functools.partial(train_step, config, decoder, optimizer), donate_argnums=0)

    def train() -> float:
        with use_mesh(mesh):
            held[0], output = step(held[0], put_batch(next(batches), mesh))
            return float(output.loss)

    return train


def in_torch(peer: str, case: Case) -> Turn:
    """A peer of ``torch_peers.py``: only its own process imports PyTorch."""
    sys.path.insert(0, str(Path(__file__).parent))
    torch_peers = importlib.import_module("torch_peers")
    if case.samples:
        return torch_peers.sampling(case, NEW_TOKENS)
    return torch_peers.training(peer, case, *batches_of(case))


PEERS: dict[str, Callable[[Case], Turn]] = {
    "ours": ours,
    "dense": functools.partial(ours, is_dense=True),
    "mixtral": functools.partial(in_torch, "mixtral"),
    "loop": functools.partial(in_torch, "loop"),
}


def serve(peer: str, case: Case) -> None:
    """A peer's process: for each line that comes, which says how many turns, a line of their seconds and losses."""
    turn = PEERS[peer](case)
    for line in sys.stdin:
        seconds, losses = [], []
        for _ in range(int(line)):
            start = time.perf_counter()
            losses.append(turn())
            seconds.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": seconds, "losses": losses, "peak_kb": peak}), flush=True)


class Peer:
    def __init__(self, name: str, case: str):
        command = [sys.executable, __file__, "--serve", name, "--only", case]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = name
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak_kb = 0

    def take_turns(self, count: int, *, counts: bool = True) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"the process of {self.name} ended; what it printed says why")
        answer = json.loads(line)
        self.seconds += answer["seconds"] if counts else []
        self.losses += answer["losses"]
        self.peak_kb = answer["peak_kb"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(name: str, rounds: int, turns: int) -> list[dict[str, Any]]:
    case = CASES[name]
    peers = [Peer(peer, name) for peer in case.peers]
    try:
        for peer in peers:
            peer.take_turns(2, counts=False)  # the first compiles
        for number in range(rounds):
            for peer in peers if number % 2 else reversed(peers):
                peer.take_turns(turns)
    finally:
        for peer in peers:
            peer.close()
    medians = [statistics.median(peer.seconds) for peer in peers]
    tokens = case.batch * (NEW_TOKENS if case.samples else case.context)
    return [
        {
            "case": name,
            "peer": peer.name,
            "ms": round(1000 * median, 1),
            "tokens_per_second": round(tokens / median),
            "time_over_ours": round(median / medians[0], 2),
            "loss": None if case.samples else round(statistics.mean(peer.losses[-(len(peer.losses) // 4) :]), 3),
            "peak_mb": round(peer.peak_kb / 1000),
        }
        for peer, median in zip(peers, medians, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--turns", type=int, default=3, help="steps of each peer a round")
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    parser.add_argument("--serve", choices=list(PEERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    use_huge_pages()
    if arguments.serve:
        serve(arguments.serve, CASES[arguments.only[0]])
        return
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be installed; pip install -e '.[parity]'")
    for index, name in enumerate(arguments.only):
        for row in measure(name, arguments.rounds, arguments.turns):
            if arguments.json:
                print(json.dumps(row), flush=True)
                continue
            if not index and row["peer"] == "ours":
                print(f"{os.cpu_count()} cores\n")
                print("| " + " | ".join(row).replace("_", " ") + " |\n|" + "---|" * len(row))
            print("| " + " | ".join("" if value is None else str(value) for value in row.values()) + " |", flush=True)


if __name__ == "__main__":
    run(main)
