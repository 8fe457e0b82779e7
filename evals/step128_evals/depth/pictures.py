"""Curves by depth, a line for each number of requests at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PANELS = (
    ("first_token_seconds", "first token, s"),
    ("prefill_tokens_per_second", "prefill, tokens/s"),
    ("decode_tokens_per_second", "decoding, tokens/s each"),
)


def draw_curves(summary: dict[str, Any], path: Path) -> None:
    """Medians as lines, least to most as bands; prompts from the prefix cache are dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 9), layout="constrained")
    for number, (name, label) in enumerate(PANELS, start=1):
        axes = figure.add_subplot(len(PANELS), 1, number)
        for kind, depths in summary["cells"].items():
            if kind == "cached" and name == "prefill_tokens_per_second":
                continue  # next to nothing is computed, so the figure would only dwarf the others
            numbers = sorted({int(concurrency) for row in depths.values() for concurrency in row})
            for index, concurrency in enumerate(numbers):
                points = [
                    (int(depth) / 1024, row[str(concurrency)][name])
                    for depth, row in sorted(depths.items(), key=lambda pair: int(pair[0]))
                    if str(concurrency) in row and row[str(concurrency)][name]
                ]
                places = [place for place, _ in points]
                color, line = f"C{index}", "-" if kind == "cold" else "--"
                title = f"{concurrency} at once" + ("" if kind == "cold" else ", cached")
                medians = [spread["median"] for _, spread in points]
                axes.plot(places, medians, marker="o", label=title, color=color, linestyle=line)
                low, high = ([spread[end] for _, spread in points] for end in ("min", "max"))
                axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_ylabel(label)
        if name == "first_token_seconds":
            axes.set_yscale("log")  # from milliseconds out of the cache to minutes of prefill
        else:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if number == 1:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
        if number == len(PANELS):
            axes.set_xlabel("depth, Ki tokens (prompt and answer)")
    figure.savefig(path)
