"""Pictures of acceptance and of the depth that pays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Value = tuple[float | None, dict[str, float] | None]
Series = tuple[str, list[Value]]
Panel = tuple[str, list[Series]]


def draw_domains(summary: dict[str, Any], path: Path) -> None:
    """Bars by domain: the cumulative rate of each position (if anything was drafted), and the decoding speed."""
    groups = list(summary["domains"].items())
    positions = list(summary["all"]["positions"])
    series = []
    for position in positions:
        rows = [group["positions"][position] for _, group in groups]
        series.append((f"position {position}", [(row["rate"], row["rate_interval"]) for row in rows]))
    speed = [(group["decode_tokens_per_second"], group["decode_tokens_per_second_interval"]) for _, group in groups]
    names = [name for name, _ in groups]
    panels = [("drafts accepted, cumulative share", series)] if series else []
    _draw([*panels, ("decoding, tokens/s", [("speed", speed)])], names, path)


def draw_depths(advice: dict[str, Any], path: Path) -> None:
    """Bars by domain: decoding speed at each measured depth."""
    groups = advice["domains"]
    series = []
    for depth in advice["measured_depths"]:
        rows = [group["depths"].get(str(depth), {}) for group in groups.values()]
        values = [(row.get("decode_tokens_per_second"), row.get("decode_tokens_per_second_interval")) for row in rows]
        series.append((f"MTP {depth}", values))
    _draw([("decoding, tokens/s", series)], list(groups), path)


def _draw(panels: Sequence[Panel], names: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2 * len(panels)), layout="constrained")
    for number, (label, series) in enumerate(panels, start=1):
        axes = figure.add_subplot(len(panels), 1, number)
        width = 0.8 / max(len(series), 1)
        for index, (name, values) in enumerate(series):
            shown = [(x, value, interval) for x, (value, interval) in enumerate(values) if value is not None]
            places = [x + (index - (len(series) - 1) / 2) * width for x, _, _ in shown]
            heights = [value for _, value, _ in shown]
            axes.bar(places, heights, width * 0.9, label=name)
            ends = [(i["low"], i["high"]) if i else (value, value) for _, value, i in shown]
            below = [max(0.0, height - low) for height, (low, _) in zip(heights, ends, strict=True)]
            above = [max(0.0, high - height) for height, (_, high) in zip(heights, ends, strict=True)]
            axes.errorbar(places, heights, yerr=[below, above], fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        if len(series) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path)
