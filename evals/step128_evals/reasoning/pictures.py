"""The picture of ``reasoning``: a box a level, and every answer as a dot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def draw_boxes(lengths: Mapping[str, Sequence[float]], unit: str, model: str, path: Path) -> None:
    """Save a box plot as SVG.

    Args:
        lengths: of the reasoning, by level.
        unit: of the lengths.
        model: for the title.
        path: of the picture.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.boxplot(list(lengths.values()), tick_labels=list(lengths), showmeans=True, showfliers=False, widths=0.5)
    for place, values in enumerate(lengths.values(), start=1):
        # Spread by rank, not at random: the same run gives the same picture.
        spread = [place + 0.18 * ((rank * 7) % 11 - 5) / 5 for rank in range(len(values))]
        axes.scatter(spread, values, s=12, alpha=0.5, color="#4c78a8", zorder=3)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("reasoning_effort")
    axes.set_ylabel(f"reasoning, {unit}")
    axes.set_title(f"Amount of thinking: {model}")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, format="svg")
