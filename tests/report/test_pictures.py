"""The two pictures of a run, and the command that draws them again."""

import json
import os
import sys

import matplotlib.axes
import matplotlib.image
import numpy as np
import pytest

from moe_jax.commands.report import main
from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.report.pictures import _shares, draw, plot_expert_load, plot_loss_curve
from moe_jax.runs.layout import RunDirectory


def make_run(folder, records):
    run = RunDirectory(folder)
    run.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def evaluations(num_layers, num_experts, steps=(100, 200)):
    rng = np.random.default_rng(0)
    return [
        {
            "step": step,
            "train_eval/loss": 300 / step,
            "val/loss": 310 / step,
            "moe/load": rng.dirichlet(np.ones(num_experts), num_layers).tolist(),
        }
        for step in steps
    ]


@pytest.fixture
def drawn(monkeypatch):
    """The calls of Axes.plot and Axes.imshow: what the pictures show."""
    calls = []
    for name in ("plot", "imshow"):
        original = getattr(matplotlib.axes.Axes, name)

        def record(axes, *arguments, _name=name, _original=original, **options):
            calls.append((_name, arguments, options))
            return _original(axes, *arguments, **options)

        monkeypatch.setattr(matplotlib.axes.Axes, name, record)
    return calls


@pytest.mark.parametrize("name", ["$MODEL_$SEED", "$x^{$", "日本 \t", os.fsdecode(b"\xff")])
def test_any_name_of_a_folder_is_a_title(tmp_path, name):
    (tmp_path / name).mkdir()
    run = make_run(tmp_path / name, evaluations(1, 4))
    assert draw(run) == [run.loss_curve, run.expert_load]


@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 1), (1, 4), (24, 64), (4, 8)])
def test_both_pictures_are_written_at_a_legible_size(tmp_path, num_layers, num_experts):
    run = make_run(tmp_path, evaluations(num_layers, num_experts))
    assert plot_loss_curve(run) == run.loss_curve
    assert plot_expert_load(run) == run.expert_load
    for file in (run.loss_curve, run.expert_load):
        height, width, _ = matplotlib.image.imread(file).shape
        assert 500 <= height <= 1600
        assert 800 <= width <= 1600
    assert sorted(item.name for item in tmp_path.iterdir()) == ["expert_load.png", "loss_curve.png", "metrics.jsonl"]


def test_the_loss_curve_shows_each_loss_and_the_best(tmp_path, drawn):
    records = [
        {"step": 10, "train/loss": 4.0},
        {"step": 20, "train/loss": None},
        {"step": 30, "train/loss": 3.0},
        {"step": 30, "train_eval/loss": 2.5, "val/loss": 2.75},
        {"step": 60, "train_eval/loss": 2.0, "val/loss": 2.875},
    ]
    plot_loss_curve(make_run(tmp_path, records))
    shown = {options["label"]: arguments for _, arguments, options in drawn}
    assert shown == {
        "training batches": ([10, 30], [4.0, 3.0]),
        "training split": ([30, 60], [2.5, 2.0]),
        "validation split": ([30, 60], [2.75, 2.875]),
        "best validation: 2.7500 at step 30": (30, 2.75),
    }


@pytest.mark.parametrize(("last", "is_log"), [(2.0, False), (0.2, True), (0.0, False)])
def test_the_axis_is_logarithmic_where_the_loss_spans_it(tmp_path, monkeypatch, last, is_log):
    scales = []
    original = matplotlib.axes.Axes.set_yscale
    monkeypatch.setattr(
        matplotlib.axes.Axes, "set_yscale", lambda axes, scale: (scales.append(scale), original(axes, scale))
    )
    plot_loss_curve(make_run(tmp_path, [{"step": 1, "train/loss": 5.0}, {"step": 2, "train/loss": last}]))
    assert ("log" in scales) == is_log


def test_the_heatmap_shows_the_last_load_and_the_lines_each_layers_busiest_expert(tmp_path, drawn):
    records = [
        {"step": 10, "moe/load": [[1, 0, 0, 0], [1, 1, 1, 1]]},
        {"step": 15, "train/loss": 1.0},
        {"step": 20, "moe/load": [[6, 2, 0, 0], [3, 3, 3, 1]]},
    ]
    plot_expert_load(make_run(tmp_path, records))
    (heat,) = [arguments[0] for name, arguments, _ in drawn if name == "imshow"]
    np.testing.assert_allclose(heat, [[0.75, 0.25, 0, 0], [0.3, 0.3, 0.3, 0.1]])
    first, second = [arguments for name, arguments, _ in drawn if name == "plot"]
    assert first[0] == second[0] == [10, 20]
    np.testing.assert_allclose([first[1], second[1]], [[4.0, 3.0], [1.0, 1.2]])


@pytest.mark.parametrize("loads", [[[[1.0], [1.0, 2.0]]], [[[1.0]], [[1.0, 2.0]]], [[[]]], [[]], [[], [[1.0]]]])
def test_loads_that_no_run_writes_are_an_error(tmp_path, loads):
    run = make_run(tmp_path, [{"step": step, "moe/load": load} for step, load in enumerate(loads)])
    with pytest.raises(UserError, match=r'each "moe/load" in .*metrics.jsonl must have a number'):
        plot_expert_load(run)


def test_shares_do_not_depend_on_the_unit_and_are_undefined_without_rows():
    counts = [[[2, 6], [0, 0]]]
    np.testing.assert_array_equal(_shares(counts), [[[0.25, 0.75], [np.nan, np.nan]]])
    np.testing.assert_array_equal(_shares([[[0.25, 0.75], [None, 1.0]]]), [[[0.25, 0.75], [np.nan, np.nan]]])


def test_a_broken_router_is_still_drawn(tmp_path):
    run = make_run(
        tmp_path, [{"step": 1, "moe/load": [[0, 0, 0], [1, 0, 0]]}, {"step": 2, "moe/load": [[None] * 3] * 2}]
    )
    assert plot_expert_load(run) == run.expert_load


def test_nothing_to_show_makes_no_file(tmp_path):
    run = make_run(tmp_path, [{"step": 1, "train/loss": None}])
    assert plot_loss_curve(run) is None
    assert plot_expert_load(run) is None
    assert list(tmp_path.iterdir()) == [run.metrics_file]


def test_a_folder_without_metrics_is_reported(tmp_path):
    with pytest.raises(UserError, match="no metrics at"):
        plot_loss_curve(RunDirectory(tmp_path))


def test_the_command_draws_the_run_again_that_it_is_given_or_that_changed_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine/checkpoints/10").mkdir(parents=True)
    run = make_run(tmp_path / "runs/mine", evaluations(2, 4))
    run.save_config(Config())
    run.loss_curve.write_text("an old one")
    for flags, shown in ((["--workdir", str(run.path)], run.path), ([], "runs/mine")):
        monkeypatch.setattr(sys, "argv", ["report", *flags])
        main()
        assert capsys.readouterr().out == f"{shown}/loss_curve.png\n{shown}/expert_load.png\n"
    assert matplotlib.image.imread(run.loss_curve).shape[2] == 4
    run.metrics_file.write_text("")
    with pytest.raises(UserError, match="runs/mine has no metrics to draw yet; train it for a while first"):
        main()
