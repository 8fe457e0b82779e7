"""The picture of ``tools``: share passed, a bar a group, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_bars(groups: Sequence[tuple[str, dict[str, Any]]], model: str, path: Path) -> None:
    """Save horizontal bars as SVG.

    Args:
        groups: (label, figures as in the summary); those without items are left out.
        model: for the title.
        path: of the picture.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = [(f"{label} ({row['items']})", row) for label, row in groups if row["share"] is not None]
    figure = Figure(figsize=(7.5, 0.8 + 0.32 * len(rows)), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    shares = [100 * row["share"] for _, row in rows]
    below = [100 * max(0.0, row["share"] - row["interval"]["low"]) for _, row in rows]
    above = [100 * max(0.0, row["interval"]["high"] - row["share"]) for _, row in rows]
    colors = ["#555555" if label.startswith("all ") else "#4c78a8" for label, _ in rows]
    axes.barh([label for label, _ in rows], shares, xerr=[below, above], color=colors, ecolor="#222222", capsize=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("conversations passed, % (95 % Wilson interval)")
    axes.set_title(f"Tool calling: {model}")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, format="svg")
