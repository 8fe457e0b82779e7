"""The picture of a pruning: every layer's experts by saliency, what was dropped, and where the super-experts are."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator
from numpy.typing import NDArray

from step128_checkpoint.pruning.criteria import Criterion, scores
from step128_checkpoint.pruning.decide import Pruning
from step128_checkpoint.pruning.report import dropped_shares, mean_shares

_KEPT = LinearSegmentedColormap.from_list("kept", ["#e4eff9", "#6aaed6", "#08306b"])
_DROPPED = LinearSegmentedColormap.from_list("dropped", ["#fdebe0", "#f4935a", "#8c2d04"])
_KEPT_TEXT, _DROPPED_TEXT = "#1c5a96", "#a63603"
_TOKENS, _SALIENCY = "#f4b183", "#a63603"
_CHOSEN_BY: dict[Criterion | None, str] = {
    "reap": "REAP saliency",
    "ean": "the sum of activation norms",
    "frequency": "frequency",
    "random": "chance",
    None: "hand",
}
_NUMBERS_SHOWN = 5
_CLIPPED_PERCENT = 1.0  # of the experts at either end of the colour scale, which a few of them would stretch


def draw(name: str, pruning: Pruning, experts: int) -> bytes:
    """Draw a pruning that a calibration decided.

    Left: one row a layer, its kept experts and then its dropped ones, each sorted by REAP saliency, the largest first;
    colour is the saliency (one logarithmic scale for all layers), blue kept and orange dropped. Right: the
    super-experts by number, and the shares of routed tokens and of saliency mass (sum of g·‖f‖₂) that the dropped
    experts had.

    Returns:
        A PNG file.
    """
    layers = sorted(pruning.kept)
    rows_inches = 0.19 * max(len(layers), 10)
    figure = Figure(figsize=(15, 1.9 + rows_inches), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(name, pruning, experts), fontsize=12, x=0.01, ha="left")
    axes = figure.subplot_mosaic(
        [["heat", "heat", "names", "shares"], ["kept", "dropped", ".", "."]],
        width_ratios=[5, 5, 1.9, 2.8],
        height_ratios=[rows_inches, 0.12],
    )
    scale = _heat_map(axes["heat"], pruning, layers, experts)
    for side, colours in (("kept", _KEPT), ("dropped", _DROPPED)):
        bar = figure.colorbar(
            ScalarMappable(scale, colours),
            cax=axes[side],
            orientation="horizontal",
            extend="both",
            ticks=LogLocator(subs=(1, 2, 5)),
            format=FormatStrFormatter("%g"),
        )
        bar.minorticks_off()
        bar.ax.tick_params(labelsize=8)
        bar.set_label(f"{side}: REAP saliency, mean of g·‖f‖₂ over routed tokens (units of the hidden state)", size=8)
    _super_expert_numbers(axes["names"], pruning, layers)
    _shares(axes["shares"], pruning, layers, experts)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def _title(name: str, pruning: Pruning, experts: int) -> str:
    token_share, saliency_share = mean_shares(pruning, experts)
    return (
        f"{name}: {experts} → {pruning.keep} experts in each of {len(pruning.kept)} layers, "
        f"chosen by {_CHOSEN_BY[pruning.criterion]}\n"
        f"The {experts - pruning.keep} dropped had {token_share:.1%} of a layer's routed tokens "
        f"and {saliency_share:.1%} of its saliency mass (mean of the layers)"
    )


def _heat_map(axes: Axes, pruning: Pruning, layers: list[int], experts: int) -> LogNorm:
    """Draw one row a layer; returns the colour scale."""
    saliency = np.stack([scores(pruning.saliency[layer], "reap", 0, layer) for layer in layers])
    dropped = np.stack([~np.isin(np.arange(experts), pruning.kept[layer]) for layer in layers])
    order = np.lexsort((-saliency, dropped), axis=1)
    ranked = np.take_along_axis(saliency, order, axis=1)
    scale = _scale(saliency)
    extent = (0.5, experts + 0.5, len(layers) - 0.5, -0.5)
    for colours, first, last in ((_KEPT, 0, pruning.keep), (_DROPPED, pruning.keep, experts)):
        cells = np.full(ranked.shape, np.nan)
        cells[:, first:last] = np.where(ranked > 0, ranked, np.nan)[:, first:last]
        axes.imshow(cells, colours, scale, aspect="auto", interpolation="nearest", extent=extent)
    for row, layer in enumerate(layers):
        for column in range(experts):
            if (layer, int(order[row, column])) in pruning.super_experts:
                _mark(axes, column + 1, row)
    axes.axvline(pruning.keep + 0.5, color="black", linewidth=1)
    for first, last, what, colour in (
        (0, pruning.keep, "kept", _KEPT_TEXT),
        (pruning.keep, experts, "dropped", _DROPPED_TEXT),
    ):
        if last > first:
            middle, place = (first + last + 1) / 2, axes.get_xaxis_transform()
            axes.text(middle, 1.0, f"{last - first} {what}\n", color=colour, transform=place, ha="center", va="center")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
    axes.set_ylabel("layer")
    unseen = "; white: no calibration token reached it" if (ranked <= 0).any() else ""
    axes.set_xlabel(f"experts of the layer, kept and dropped each by falling saliency{unseen}")
    return scale


def _scale(saliency: NDArray[np.float64]) -> LogNorm:
    seen = saliency[saliency > 0]
    if not len(seen):
        return LogNorm(0.1, 1)
    low, high = np.percentile(seen, [_CLIPPED_PERCENT, 100 - _CLIPPED_PERCENT])
    return LogNorm(low, max(high, 1.01 * low))


def _mark(axes: Axes, x: float, row: int) -> None:
    axes.scatter(
        [x], [row], s=34, color="#ffd400", edgecolors="black", linewidths=0.8, marker="o", zorder=3, clip_on=False
    )


def _super_expert_numbers(axes: Axes, pruning: Pruning, layers: list[int]) -> None:
    axes.set_title("super-experts,\nalways kept", fontsize=9)
    for row, layer in enumerate(layers):
        numbers = [str(expert) for its_layer, expert in sorted(pruning.super_experts) if its_layer == layer]
        if numbers:
            more = f" + {len(numbers) - _NUMBERS_SHOWN}" if len(numbers) > _NUMBERS_SHOWN else ""
            _mark(axes, 0.06, row)
            axes.text(0.12, row, f"expert {', '.join(numbers[:_NUMBERS_SHOWN])}{more}", fontsize=7.5, va="center")
    axes.set_xlim(0, 1)
    _align_rows(axes, layers)
    axes.set_xticks([])


def _shares(axes: Axes, pruning: Pruning, layers: list[int], experts: int) -> None:
    values = 100 * np.asarray([dropped_shares(pruning, layer, experts) for layer in layers])
    rows = np.arange(len(layers))
    axes.barh(rows - 0.2, values[:, 0], 0.4, color=_TOKENS, label="routed tokens")
    axes.barh(rows + 0.2, values[:, 1], 0.4, color=_SALIENCY, label="saliency mass")
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, frameon=False, borderpad=0)
    axes.set_xlabel("share of the dropped experts, %")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    _align_rows(axes, layers)


def _align_rows(axes: Axes, layers: list[int]) -> None:
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_yticks([])
