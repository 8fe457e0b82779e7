"""The picture of ``vision``: a bar a category with its interval, and what was right without the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw_categories(categories: Mapping[str, Mapping[str, Any]], model: str, path: Path) -> None:
    """Save a chart as SVG.

    Args:
        categories: as ``summarize`` has them.
        model: for the title.
        path: of the picture.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    names = [name for name, row in categories.items() if row["asked"]]
    figure = Figure(figsize=(7, 0.45 * len(names) + 1.4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    without: str | None = "without"  # the first such mark stands for all in the legend
    for place, name in enumerate(names):
        row = categories[name]
        share, interval = 100 * row["share"], row["interval"]
        reach = [[share - 100 * interval["low"]], [100 * interval["high"] - share]]
        axes.barh(place, share, height=0.6, color="#4c78a8", label=None if place else "with the pictures")
        axes.errorbar(share, place, xerr=reach, color="black", capsize=3, linewidth=1)
        if row["blind"]:
            blind = 100 * row["blind"]["share"]
            axes.plot(blind, place, "D", color="#e45756", label=without)
            without = None
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    axes.set_xlabel("right answers, % (95 % Wilson interval)")
    axes.set_title(f"Vision: {model}")
    axes.legend(loc="lower right")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, format="svg")
