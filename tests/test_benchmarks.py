"""The commands that measure a GPU, on a CPU: speed is no matter of tests, that they run through is."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def measure(folder: Path, *arguments: str) -> tuple[list[dict], str]:
    """(the rows of gpu.jsonl, what was printed)."""
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--out", str(folder), *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()], done.stdout


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py as a module."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks/gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_stages_on_small_shapes_end_in_a_file_and_a_table(tmp_path):
    rows, printed = measure(tmp_path, "--stages", "device", "sweep")
    assert not [row for row in rows if "error" in row]
    assert [row["stage"] for row in rows if "seconds" in row] == ["device", "sweep"]
    assert all(row["share"] > 0 for row in rows if row.get("tflops"))
    assert [json.loads(line) for line in printed.splitlines() if line.startswith("{")] == rows
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len([row for row in rows if "what" in row])


@pytest.mark.slow
def test_every_stage_runs_through_on_small_shapes(tmp_path):
    rows, _ = measure(tmp_path, "--no-torch", "--seconds", "800")
    assert not [row for row in rows if "error" in row or "skipped" in row]
    assert [row for row in rows if row["stage"] == "parity" and not row.get("ok", True)] == []
    assert len([row for row in rows if "seconds" in row]) == 8


def test_a_stage_that_starts_too_late_is_left_out(tmp_path):
    rows, _ = measure(tmp_path, "--seconds", "0.001", "--stages", "torch", "device", "sweep")
    assert [row["stage"] for row in rows] == ["torch", "device", "sweep"]
    assert all("skipped" in row for row in rows)


def test_a_process_that_dies_ends_one_stage(gpu, monkeypatch):
    started = []

    def lines_of(command, _seconds):
        started.append(command[command.index("--stages") + 1 :])
        if len(started) == 1:
            yield {"stage": "device", "seconds": 1.0, "product_rate": 5.0}
            yield -9
        else:
            yield {"stage": "sweep", "seconds": 1.0}
            yield 0

    monkeypatch.setattr(gpu, "lines_of", lines_of)
    report = gpu.Report(None)
    gpu.with_jax(report, ["device", "parity", "sweep"], argparse.Namespace(remat="none", tiny=False), 0.0)
    assert [(row["stage"], "error" in row) for row in report.rows] == [
        ("device", False),
        ("parity", True),
        ("sweep", False),
    ]
    # The ceiling is measured once, for all that come after.
    assert started == [["device", "parity", "sweep"], ["sweep", "--product-rate", "5.0"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peer", "case"),
    [
        ("ours", "context 128"),
        ("dense", "context 128"),
        ("mixtral", "context 128"),
        ("loop", "makeMoE's shape"),
        ("ours", "sampling, 1 text"),
    ],
)
def test_a_peer_takes_as_many_turns_as_it_is_told(peer, case):
    if peer in ("mixtral", "loop"):
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    command = [sys.executable, "benchmarks/peers.py", "--serve", peer, "--only", case]
    done = subprocess.run(command, cwd=ROOT, input="1\n2\n", capture_output=True, text=True, check=False, timeout=600)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [len(answer["seconds"]) for answer in answers] == [1, 2], done.stderr
    losses = [loss for answer in answers for loss in answer["losses"]]
    if case.startswith("sampling"):
        assert losses == [None] * 3
    else:  # of a new model: the logarithm of the vocabulary
        assert losses == sorted(losses, reverse=True)
        assert 4 < losses[0] < 8


def done(*command: str) -> str:
    """What a script printed."""
    arguments = [sys.executable, *command]
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_balancers_are_compared_in_a_table_and_no_run_is_made_twice(tmp_path):
    command = ["benchmarks/balancers.py", "--out", str(tmp_path), "--steps", "62", "--rounds", "2", "--json", "--only"]
    command += ["sequence 0.05", "bias by quantile"]
    rows = [json.loads(line) for line in done(*command).splitlines()]
    assert [row["balancer"] for row in rows] == command[-2:]
    assert rows[0]["step_time"] == 1.0
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("metrics.jsonl")}
    assert len(written) == 2
    done(*command)
    assert {file: file.stat().st_mtime_ns for file in written} == written


@pytest.mark.slow
def test_a_budget_of_the_crossover_is_the_run_of_train_py_with_as_many_steps(tmp_path):
    results, shape = tmp_path / "crossover.jsonl", "8 experts of 128"
    results.write_text(json.dumps({"shape": shape, "seconds": 1.0}) + "\n")
    command = ["benchmarks/crossover.py", "--out", str(results), "--only", shape, "--minutes", "1.1", "1.3"]
    assert done(*command).splitlines()[-1].startswith(f"| {shape} | 1000 | ")
    rows = [json.loads(line) for line in results.read_text().splitlines()][1:]
    assert [row["steps"] for row in rows] == [66, 78]
    settings = ["--model.moe.expert-dim", "128", "--optimizer.schedule", "wsd", "--train.num-steps", "66"]
    done("train.py", "--config", "configs/moe.py", "--workdir", str(tmp_path / "run"), *settings)
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert rows[0]["nats"] == round(last["val/loss"], 4)
    done(*command, "--plot", str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["h100", "a100"])
def test_every_kernel_that_auto_may_choose_compiles_for_a_gpu_that_is_not_there(device):
    packages = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if not any(importlib.util.find_spec(name) for name in packages):
        pytest.skip("needs jax[cuda12] or jax[cuda13], for their compiler")
    command = [sys.executable, "benchmarks/compile_only.py", "--devices", device, "--parts", "kernels", "attention"]
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = [row for row in rows if row["part"] == "kernels"]
    assert len(kernels) > 50
    assert all(row["tensor_core_ops"] for row in kernels if "bfloat16" in row["what"])
    assert max(row["spilled_bytes"] for row in kernels) <= 256, "a few words, outside of the loop"
    assert all(row["cudnn_calls"] == 2 for row in rows if row["part"] == "attention")


@pytest.mark.slow
@pytest.mark.parametrize(
    "extras", ["cuda12", "cuda13", "tpu", "parity", "tensorboard,text,hub,gpt2,cl100k,mlflow,server"]
)
def test_every_extra_installs_beside_the_requirements(extras):
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["-r", "requirements.txt", f"moe_jax[{extras}] @ {ROOT.as_uri()}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
