"""The two pictures of a run. matplotlib is imported inside the functions: it takes most of a second."""

import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_jax.errors import UserError
from moe_jax.files import atomic_file
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.metrics_file import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger("moe_jax")

_MAX_LEGEND = 8
_MAX_CELLS_WITH_TEXT = 200


def draw(run: RunDirectory) -> list[Path]:
    """Writes the pictures that the metrics of ``run`` allow. Raises UserError as read_metrics does."""
    return [file for file in (plot_loss_curve(run), plot_expert_load(run)) if file is not None]


def plot_loss_curve(run: RunDirectory) -> Path | None:
    """Writes loss_curve.png from metrics.jsonl; None where there is no loss yet, or on a full disk.

    Raises UserError as read_metrics does.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = read_metrics(run.metrics_file)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    styles: dict[str, dict[str, Any]] = {
        "train/loss": {"color": "0.6", "linewidth": 1, "marker": ".", "markersize": 2, "label": "training batches"},
        "train_eval/loss": {"color": "tab:blue", "marker": "o", "markersize": 3, "label": "training split"},
        "val/loss": {"color": "tab:red", "marker": "o", "markersize": 3, "label": "validation split"},
    }
    series = {name: _series(records, name) for name in styles}
    losses = [loss for _, values in series.values() for loss in values]
    if not losses:
        return None
    for name, (steps, values) in series.items():
        if steps:
            axes.plot(steps, values, **styles[name])
    if series["val/loss"][0]:
        _mark_best(axes, *series["val/loss"])
    if min(losses) > 0 and max(losses) / min(losses) > 5:
        _use_log_scale(axes)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.set_title(f"Loss of {run.name}", parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    return _save(figure, run.loss_curve)


def _series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _mark_best(axes: "Axes", steps: list[int], losses: list[float]) -> None:
    best = int(np.argmin(losses))
    axes.plot(
        steps[best],
        losses[best],
        linestyle="none",
        marker="*",
        markersize=13,
        markeredgecolor="white",
        color="tab:red",
        zorder=3,
        label=f"best validation: {losses[best]:.4f} at step {steps[best]:,}",
    )


def _use_log_scale(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    # A loss spans about one decade, so 1, 2, 5 are labelled too.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def plot_expert_load(run: RunDirectory) -> Path | None:
    """Writes expert_load.png from the "moe/load" of metrics.jsonl; None for a dense run or on a full disk.

    Raises UserError as read_metrics does.

    Above: each expert's share of its layer's rows at the last evaluation. Below: how far the busiest expert of each
    layer was over the balanced share, at every evaluation.
    """
    from matplotlib.figure import Figure

    steps, loads = _series(read_metrics(run.metrics_file), "moe/load")
    if not loads:
        return None
    try:
        shares_SNE = _shares(loads)
        _, num_layers, num_experts = shares_SNE.shape
        shares_SNE[0, 0, 0]
    except (ValueError, IndexError):
        raise UserError(
            f'each "moe/load" in {run.metrics_file} must have a number for each expert of each layer; mend the lines'
        ) from None
    heat_height = min(max(0.35 * num_layers, 1.4), 7.0)
    figure = Figure(figsize=(min(max(0.55 * num_experts + 2, 7), 13), heat_height + 4.2), layout="constrained")
    figure.suptitle(
        f"Expert load of {run.name} at step {steps[-1]:,}: white is the balanced share, {100 / num_experts:.3g}%",
        parse_math=False,
    )
    above, below = figure.subplots(2, 1, height_ratios=[heat_height, 3.0])
    _draw_heatmap(figure, above, shares_SNE[-1])
    _draw_max_load(figure, below, steps, np.max(shares_SNE, axis=-1) * num_experts)
    return _save(figure, run.expert_load)


def _shares(loads: Sequence[Any]) -> np.ndarray:
    """[S, N, E] loads, as counts or shares, divided by their sum over experts; NaN where nothing was routed."""
    loads_SNE = np.array(loads, dtype=float)
    sums_SN1 = np.sum(loads_SNE, axis=-1, keepdims=True)
    return loads_SNE / np.where(sums_SN1 > 0, sums_SN1, math.nan)


def _draw_heatmap(figure: "Figure", axes: "Axes", shares_NE: np.ndarray) -> None:
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import PercentFormatter

    num_layers, num_experts = shares_NE.shape
    balanced = 1 / num_experts
    finite = shares_NE[np.isfinite(shares_NE)]
    norm = TwoSlopeNorm(vmin=0, vcenter=balanced, vmax=max(2 * balanced, float(np.max(finite, initial=0))))
    image = axes.imshow(shares_NE, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, format=PercentFormatter(1, decimals=None), label="share of rows", pad=0.01)
    axes.set(xlabel="expert", ylabel="MoE layer")
    axes.set_xticks(range(0, num_experts, math.ceil(num_experts / 16)))
    axes.set_yticks(range(0, num_layers, math.ceil(num_layers / 12)))
    if shares_NE.size > _MAX_CELLS_WITH_TEXT or num_experts > 16:
        return
    for (layer, expert), share in np.ndenumerate(shares_NE):
        if not math.isfinite(share):
            continue
        is_dark = abs(float(norm(share)) - 0.5) > 0.3  # both ends of the colour map are
        axes.text(expert, layer, f"{100 * share:.1f}", ha="center", va="center", color="white" if is_dark else "black")


def _draw_max_load(figure: "Figure", axes: "Axes", steps: list[int], max_load_SN: np.ndarray) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    num_layers = max_load_SN.shape[1]
    norm = Normalize(0, max(num_layers - 1, 1))
    colors = colormaps["viridis"]
    for layer in range(num_layers):
        axes.plot(
            steps, max_load_SN[:, layer], color=colors(norm(layer)), marker="o", markersize=3, label=f"layer {layer}"
        )
    axes.axhline(1, color="0.4", linestyle="--", linewidth=1)
    axes.set(xlabel="optimizer step", ylabel="times the balanced share", title="Busiest expert of each layer")
    axes.set_ylim(0, 1.1 * max(float(np.max(max_load_SN[np.isfinite(max_load_SN)], initial=0)), 1.2))
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.grid(alpha=0.3)
    if num_layers <= _MAX_LEGEND:
        axes.legend(frameon=False, ncols=min(num_layers, 4))
    else:
        figure.colorbar(ScalarMappable(norm, colors), ax=axes, label="MoE layer", pad=0.01)


def _save(figure: "Figure", file: Path) -> Path | None:
    """``file``; None where the disk does not take it, which ends no run: metrics.jsonl is there to draw it from."""
    try:
        with atomic_file(file) as beside, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a run may be called in any script
            figure.savefig(beside, format="png", dpi=120)
    except OSError as error:
        log.warning(f"warning: {file} cannot be written ({error.strerror or error}); the run is complete without it")
        return None
    return file
