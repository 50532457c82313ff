"""What the real compilers of GPUs and TPUs make of the kernels and of whole training steps, without such a device.

    pip install 'jax[cuda12]'    # or jax[cuda13], or for TPUs jax[tpu]
    python benchmarks/compile_only.py [--devices h100 a100 v5e v5p] [--parts kernels attention steps] [--json]

XLA compiles for a device that is only described. *kernels*: every block size that ``auto`` may choose, with registers,
bytes spilled and tensor-core instructions, as ptxas and the program's text say. *attention*: cuDNN's, forward and
backward. *steps*: optimizer steps, with the bytes that a device has to hold. What no compiler can tell are times and
wrong results. A device whose compiler is not installed is left out with a line that says so.
"""
# ruff: noqa: E402 - jax reads its environment when it is first imported

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"  # no device is opened
DUMP = Path(tempfile.mkdtemp(prefix="moe_jax_ptx_"))
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={DUMP} --xla_dump_hlo_as_text=false"

import jax
import jax.numpy as jnp
from gpu_blocks import Kind, kernel, operands
from gpu_session import Shape, text_of
from gpu_stages import sparse, stories
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.cli import load_recipe
from moe_jax.config import Config
from moe_jax.errors import EnvironmentFault, run
from moe_jax.estimate.devices import KINDS, absent_mesh, machine_of
from moe_jax.model.decoder import Decoder
from moe_jax.model.moe.backends import for_machine
from moe_jax.model.moe.kernels.grouped import Blocks
from moe_jax.model.moe.kernels.pallas import tuning
from moe_jax.sharding.mesh import use_mesh
from moe_jax.training.optimizer import make_optimizer, make_schedule
from moe_jax.training.state import abstract_state
from moe_jax.training.step import train_step

Row = dict[str, Any]
GPUS, TPUS = ("h100", "h200", "a100"), {"v5e": 8, "v5p": 4}
"""TPUs: of a slice of so many."""
SHAPES = [(1024, 4096, 8), (2048, 768, 128), (512, 512, 64), (1280, 640, 64), (256, 2640, 8)]
"""D, F, E of the layers whose blocks are compiled."""


def mesh_of(name: str) -> Mesh:
    """One GPU, or a small slice of TPUs, that are not there. Raises EnvironmentFault without their compiler."""
    return absent_mesh(name, {"data": TPUS.get(name, 1), "fsdp": 1, "expert": 1, "tensor": 1})


def on(mesh: Mesh, tree: Any, spec: PartitionSpec | None = None) -> Any:
    sharding = NamedSharding(mesh, spec or PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def guarded(what: str, measure: Callable[[], Row]) -> Row:
    """A row of what the compiler made, or of why it refused."""
    start = time.time()
    try:
        row = measure()
    except Exception as error:  # noqa: BLE001 - compilers raise what they like
        row = {"error": text_of(error)}
    return {"what": what, "seconds": round(time.time() - start, 1)} | row


def kernels(name: str, mesh: Mesh) -> Iterator[Row]:
    kind_of: dict[str, Kind] = {
        "hidden": "hidden",
        "into_D": "rows_gradient",
        "into_F": "hidden_gradient",
        "up_gradient": "weight_gradient",
        "down_gradient": "weight_gradient",
    }
    seen = set()
    for dtype in ("bfloat16", "float32"):
        for D, F, E in SHAPES:
            for share in (1024, 64, 1):
                tuned = tuning(share * E, E, D, F, jnp.dtype(dtype), KINDS[name].shared_of_block)
                for each, kind in kind_of.items():
                    blocks = getattr(tuned, each)
                    # Whether widths are multiples of their blocks decides on masks, and nothing else does.
                    masked = (
                        D % blocks.columns > 0,
                        F % blocks.columns > 0,
                        D % blocks.depth > 0,
                        F % blocks.depth > 0,
                    )
                    if (kind, blocks, dtype, masked) in seen:
                        continue
                    seen.add((kind, blocks, dtype, masked))
                    shape = (D, F, 2, 2)  # two experts: how many there are changes no kernel
                    what = f"{kind}, D={D} F={F}, {dtype}, {name_of(blocks)}"
                    yield guarded(what, functools.partial(one_kernel, mesh, kind, shape, blocks, dtype))

        for D, F in ((1024, 4096), (200, 2640)):
            for kind in ("gather", "activation_gradient"):
                one = functools.partial(one_kernel, mesh, kind, (D, F, 2, 2), Blocks(16, 128, 0, 4, 1), dtype)
                yield guarded(f"{kind}, D={D} F={F}, {dtype}", one)


def one_kernel(mesh: Mesh, kind: Kind, shape: Shape, blocks: Blocks, dtype: str) -> Row:
    for old in DUMP.glob("*.ptx"):
        old.unlink()
    shapes = jax.eval_shape(functools.partial(operands, shape, 256, dtype))
    jax.jit(kernel(kind, blocks)).lower(on(mesh, shapes)).compile()
    return resources(next(path for path in DUMP.glob("*.ptx") if ".entry moe_" in path.read_text()))


def resources(ptx: Path) -> Row:
    """What ptxas says of the program's kernel."""
    text = ptx.read_text()
    target = re.search(r"\.target (\w+)", text)
    command = [ptxas(), "-v", f"-arch={target.group(1) if target else 'sm_90a'}", str(ptx), "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"entry function '(moe_\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", said, re.DOTALL)
    if not found:
        return {"error": said.strip()[:200]}
    tensor_cores = len(re.findall(r"wgmma\.mma_async|mma\.sync", text))
    return {"registers": int(found.group(3)), "spilled_bytes": int(found.group(2)), "tensor_core_ops": tensor_cores}


def ptxas() -> str:
    import nvidia  # pyrefly: ignore[missing-import]

    found = sorted(path for root in nvidia.__path__ for path in Path(root).glob("*/bin/ptxas"))
    return str(found[0]) if found else "ptxas"


def attention(name: str, mesh: Mesh) -> Iterator[Row]:
    for L, H, A in ((4096, 10, 128), (1080, 4, 64)):
        yield guarded(
            f"cuDNN, forward and backward, L={L} H={H} A={A}", functools.partial(one_attention, mesh, L, H, A)
        )


def one_attention(mesh: Mesh, L: int, H: int, A: int) -> Row:
    def loss(query: Any, key: Any, value: Any) -> Any:
        out = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")
        return jnp.sum(out.astype(jnp.float32))

    array = on(mesh, jax.ShapeDtypeStruct((16, L, H, A), jnp.bfloat16))
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(array, array, array).compile()
    calls = (compiled.as_text() or "").count('custom_call_target="__cudnn$fmha')
    return {"cudnn_calls": calls} | memory_of(compiled)


def steps(name: str, mesh: Mesh) -> Iterator[Row]:
    recipe = load_recipe(Path(__file__).parents[1] / "configs/moe.py")
    cases: dict[str, tuple[Config, int]] = {"configs/moe.py": (recipe, 2048)}
    if name in GPUS:
        cases |= {
            "configs/tinystories_moe_135m.py": (stories(False), 2048),
            "6 layers, 4 heads": (sparse(6, 4, tiny=False), 16384),
            "14 layers, 10 heads": (sparse(14, 10, tiny=False), 16384),
        }
    for what, (config, vocab_size) in cases.items():
        yield guarded(f"a step of {what}", functools.partial(one_step, name, mesh, config, vocab_size))


def one_step(name: str, mesh: Mesh, config: Config, vocab_size: int) -> Row:
    machine = machine_of(KINDS[name])
    B, L = config.data.batch_size, config.model.context_length
    num_tokens = B // config.optimizer.accumulation_steps * L
    model = for_machine(config.model, num_tokens, train=True, machine=machine)
    decoder = Decoder(model, vocab_size)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.train.num_steps))
    with use_mesh(mesh):
        state = abstract_state(decoder, optimizer, mesh)
        ids = on(mesh, jax.ShapeDtypeStruct((B, L), jnp.int32), PartitionSpec("data"))
        step = jax.jit(functools.partial(train_step, config, decoder, optimizer), donate_argnums=0)
        compiled = step.lower(state, {"inputs": ids, "targets": ids}).compile()
    return {"dispatch": model.moe.dispatch, "attention": model.attention} | memory_of(compiled)


def memory_of(compiled: Any) -> Row:
    found = compiled.memory_analysis()
    return {"arguments_gb": gb(found.argument_size_in_bytes), "temporaries_gb": gb(found.temp_size_in_bytes)}


def gb(size: int) -> float:
    return round(size / 1e9, 2)


def name_of(blocks: Blocks) -> str:
    return f"{blocks.rows}x{blocks.columns}x{blocks.depth}/{blocks.warps}w{blocks.stages}s"


PARTS = {"kernels": kernels, "attention": attention, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--devices", nargs="+", choices=[*GPUS, *TPUS], default=["h100", "a100", *TPUS])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    arguments = parser.parse_args()
    failed = False
    if not arguments.json:
        print("| device | what | seconds | result |\n|---|---|---|---|")
    for name in arguments.devices:
        try:
            mesh = mesh_of(name)
        except EnvironmentFault as error:
            print(json.dumps({"device": name, "skipped": text_of(error)[:200]}), flush=True)
            continue
        for part in arguments.parts if name in GPUS else ["steps"]:
            for row in PARTS[part](name, mesh):
                failed |= "error" in row
                if arguments.json:
                    print(json.dumps({"device": name, "part": part} | row), flush=True)
                    continue
                rest = ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("what", "seconds"))
                print(f"| {name} | {row['what']} | {row.get('seconds', '')} | {rest} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    run(main)
