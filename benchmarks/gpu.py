"""What matters on one GPU, in a few minutes: ceilings, exactness, layers, training, PyTorch beside it, sampling.

    python benchmarks/gpu.py [--out DIR] [--stages device parity layer ...] [--seconds 360] [--no-torch] [--tiny]

Stages run in the order of their worth, and each row is printed, and appended to DIR/gpu.jsonl, as soon as it is known:
a run that is cut has measured the best. What fails is a row with its error, and the next goes on. The last thing
printed is one table.

*device*: the card, and the two ceilings, a copy and a large product. *parity*: backends against a loop in float32.
*layer*, *layer_long*: one MoE layer of 16,384 and of 65,536 tokens. *train*: a step of a model of 14 layers, and of
configs/tinystories_moe_135m.py; *ladder*: of smaller ones. *torch*: a step of the model of 14 layers in PyTorch
(``torch_moe.py``). *sweep*: block sizes of the grouped products. *sampling*: tokens drawn.

*Share* is of the large product's rate. A step's operations are those of the matrices a token passes, forward and
backward, with half of the keys of each query, which is what a causal mask leaves; ``..._all_keys`` counts them all.

Measuring is done in processes of their own, so that JAX has given back the GPU when PyTorch starts, and that a crash
ends one stage. ``--tiny`` shrinks all of it, to try the command on a CPU.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from moe_jax.errors import UserError, run

Row = dict[str, Any]
STAGES = ("device", "parity", "layer", "train", "sweep", "torch", "sampling", "ladder", "layer_long")
"""By worth."""
TORCH_SECONDS = 90
GRACE = 60
"""Seconds past its time after which a process is ended: what it does then may still be its last row."""


class Report:
    """Rows, on the standard output and in a file as they come, and in a table at the end."""

    def __init__(self, folder: Path | None):
        self.rows: list[Row] = []
        self._file = None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = folder / "gpu.jsonl"

    def add(self, row: Row) -> None:
        self.rows.append(row)
        line = json.dumps(row)
        print(line, flush=True)
        if self._file:
            with self._file.open("a") as file:
                file.write(line + "\n")

    def table(self) -> str:
        columns = ("ms", "tflops", "share", "tokens_per_second")
        lines = ["| stage | what | ms | TFLOP/s | share | tokens/s | more |", "|---|---|---|---|---|---|---|"]
        for row in self.rows:
            if "seconds" in row:
                continue
            known = ("stage", "what", *columns)
            more = [f"{key} {value}" for key, value in row.items() if key not in known and _is_short(value)]
            cells = ["" if row.get(key) is None else str(row[key]) for key in known]
            lines.append("| " + " | ".join([*cells, ", ".join(more).replace("|", "/")]) + " |")
        return "\n".join(lines)


def _is_short(value: Any) -> bool:
    return value is not None and value != [] and not isinstance(value, dict)


def lines_of(command: list[str], seconds: float) -> Iterator[Row | int]:
    """The JSON lines that a process prints, and its exit code; after ``seconds`` it is ended."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(max(1.0, seconds), process.kill)
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
            yield process.wait()
        finally:  # also where this process is told to end
            timer.cancel()
            process.kill()


def with_jax(report: Report, names: list[str], arguments: argparse.Namespace, deadline: float) -> None:
    """The stages, in one process, and where one ends it, the rest in another."""
    while names:
        command = [__file__, "--child", "--deadline", str(deadline), "--remat", arguments.remat]
        rate = next((row["product_rate"] for row in reversed(report.rows) if row.get("product_rate")), None)
        command += ["--stages", *names, *(["--tiny"] if arguments.tiny else [])]
        command += ["--product-rate", str(rate)] if rate else []
        row: Row | int = 0
        for row in lines_of(command, deadline + GRACE - time.time()):
            if isinstance(row, int):
                break
            report.add(row)
            if "seconds" in row or ("skipped" in row and "what" not in row and row["stage"] in names):
                names = names[names.index(row["stage"]) + 1 :] if row["stage"] in names else names
        if names:
            report.add({"stage": names[0], "error": f"its process ended with exit code {row}"})
            names = names[1:]


def with_torch(report: Report, arguments: argparse.Namespace, deadline: float) -> None:
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing or time.time() > deadline:
        why = f"{' and '.join(missing)} not installed" if missing else "no time left"
        report.add({"stage": "torch", "skipped": why})
        return
    command = [str(Path(__file__).with_name("torch_moe.py")), *(["--tiny"] if arguments.tiny else [])]
    code: Row | int = 0
    for code in lines_of(command, TORCH_SECONDS):
        if not isinstance(code, int):
            report.add({"stage": "torch"} | code)
    if code:
        report.add({"stage": "torch", "error": f"its process ended with exit code {code}"})


def child(arguments: argparse.Namespace) -> None:
    # Before jax is loaded: what it may take of the GPU's memory, from which it takes it all at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    import jax
    from gpu_session import Session
    from gpu_stages import run_stages

    # Most of the time of small shapes is that of compiling them.
    jax.config.update("jax_disable_most_optimizations", arguments.tiny)
    session = Session(arguments.tiny, arguments.remat, arguments.deadline, arguments.product_rate)
    run_stages(arguments.stages, session, lambda row: print(json.dumps(row), flush=True))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder for gpu.jsonl; without it, rows are only printed")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=360.0, help="begin no further stage after these")
    parser.add_argument("--remat", choices=["none", "dots", "full"], default="none", help="what training tries first")
    parser.add_argument("--no-torch", action="store_true", help="without the step in PyTorch")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the command on a CPU")
    for name in ("--deadline", "--product-rate"):
        parser.add_argument(name, type=float, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.seconds <= 0:
        raise UserError(f"--seconds must be positive, got {arguments.seconds}; raise it")
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.child:
        child(arguments)
        return
    report, deadline = Report(arguments.out), time.time() + arguments.seconds
    names = [name for name in arguments.stages if not (arguments.no_torch and name == "torch")]
    if "torch" in names:
        here = names.index("torch")
        with_jax(report, names[:here], arguments, deadline)
        with_torch(report, arguments, deadline)
        names = [name for name in names[here + 1 :] if name != "torch"]
    with_jax(report, names, arguments, deadline)
    print("\n" + report.table())


if __name__ == "__main__":
    run(main)
