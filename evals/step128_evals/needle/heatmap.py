"""The picture of a needle run: prompt length by depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def draw_heatmap(summary: dict[str, Any], path: Path) -> None:
    """Save a heat map: colour is the share of lines copied exactly, the numbers are items passed of those answered.

    Args:
        summary: of ``--mode step128``.
        path: ends in ``.svg``.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    lengths, depths = summary["lengths"], summary["depths"]
    shares = np.full((len(depths), len(lengths)), np.nan)
    figure = Figure(figsize=(1.6 + 0.9 * len(lengths), 1.6 + 0.4 * len(depths)), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for cell in summary["cells"]:
        row, column = depths.index(cell["depth"]), lengths.index(cell["length"])
        shares[row, column] = 100 * cell["line_share"]
        label = f"{cell['passed']}/{cell['answered']}"
        axes.text(column, row, label, ha="center", va="center", color="white" if cell["line_share"] < 0.6 else "black")
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    figure.colorbar(image, label="lines copied exactly, %")
    axes.set_xticks(range(len(lengths)), [f"{length / 1024:.4g}k" for length in lengths])
    axes.set_yticks(range(len(depths)), [str(depth) for depth in depths])
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("depth of the function, %")
    axes.set_title("Exact copies: items passed / answered")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
