"""Figures of ``--mode step128``: shares with intervals, and a table of length by depth."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from step128_evals.needle.heatmap import draw_heatmap
from step128_evals.needle.scoring import NORMALIZATIONS
from step128_evals.runs import Item, Run
from step128_evals.stats import mean_interval, wilson

CARD = (
    "The model card's `100/100` for code needle names no corpus, length, depth or scoring, so this run does not repeat "
    "it; it is the nearest that can be checked."
)
MEMORY = (
    "The files are the standard library of Python, which models have seen in training: --closed-book shows how much "
    "one knows by heart, and --corpus FOLDER asks about other code."
)
_NAMES = {
    "exact": "exact (no normalisation)",
    "rstrip": "trailing whitespace forgiven",
    "strip": "indentation forgiven too",
}


def summarize(run: Run) -> dict[str, Any]:
    """For each normalisation the share of items passed with its Wilson interval, and the mean share of lines with its
    bootstrap interval; by length and depth, exact only (closed book has neither); what went unasked or wrong."""
    settings = run.manifest.settings
    items = run.with_status("passed", "failed")
    places = [] if settings["closed_book"] else itertools.product(settings["lengths"], settings["depths"])
    cells = [_cell(items, settings["lines"], length, depth) for length, depth in places]
    return {
        "mode": "step128",
        "items_asked_for": settings["items"],
        "items_planned": settings["planned"],
        "answered": len(items),
        "request_errors": len(run.with_status("error")),
        "unsupported": len(run.with_status("unsupported")),
        "lines": settings["lines"],
        "lengths": settings["lengths"],
        "depths": settings["depths"],
        "depth_tolerance_percent": settings["depth_tolerance_percent"],
        "longest_prompt_tokens": max((tokens for item in items if (tokens := _prompt_tokens(item))), default=None),
        "closed_book": settings["closed_book"],
        "corpus": settings["corpus"],
        "token_counts": settings["token_counts"],
        **{name: _shares(items, name, settings["lines"]) for name in NORMALIZATIONS},
        "invented_lines": sum(item.data["invented_lines"] for item in items),
        "cut_by_budget": sum(item.data["finish_reason"] == "length" for item in items),
        "cells": [cell for cell in cells if cell["answered"]],
    }


def _prompt_tokens(item: Item) -> int | None:
    """As the server counted them; where it says nothing, as they were planned."""
    tokens: int | None = item.data["prompt_tokens"] or item.data["counted_prompt_tokens"]
    return tokens


def _shares(items: Sequence[Item], name: str, lines: int) -> dict[str, Any]:
    passed = sum(item.data["scores"][name]["passed"] for item in items)
    shares = [item.data["scores"][name]["lines"] / lines for item in items]
    rate, mean = wilson(passed, len(items)), mean_interval(shares) if shares else None
    return {
        "passed": passed,
        "rate": passed / len(items) if items else None,
        "interval": vars(rate) if rate else None,
        "line_share": sum(shares) / len(shares) if shares else None,
        "line_share_interval": vars(mean) if mean else None,
    }


def _cell(items: Sequence[Item], lines: int, length: int, depth: int) -> dict[str, Any]:
    here = [item for item in items if (item.data["length"], item.data["depth"]) == (length, depth)]
    scores = [item.data["scores"]["exact"] for item in here]
    return {
        "length": length,
        "depth": depth,
        "answered": len(here),
        "passed": sum(score["passed"] for score in scores),
        "line_share": sum(score["lines"] for score in scores) / (lines * len(here)) if here else None,
    }


def text(summary: dict[str, Any]) -> str:
    """Figures, table and caveats."""
    lines = [_counts(summary)]
    lines += [f"  {_NAMES[name]:31} {_figures(summary[name], summary['answered'])}" for name in NORMALIZATIONS]
    if summary["cells"]:
        lines += ["", "exact, passed/answered by prompt tokens (down) and depth in percent (across):"]
        lines += [_row("", [str(depth) for depth in summary["depths"]])]
        lines += [_row(_thousands(length), cells) for length, cells in _table(summary)]
    if summary["answered"]:
        lines += ["", *_notes(summary)]
    return "\n".join(lines)


def headline(summary: dict[str, Any]) -> str:
    """Exact copies, with their interval, and the longest prompt."""
    interval = summary["exact"]["interval"]
    if interval is None:
        return "nothing answered yet"
    low, high = (100 * interval[end] for end in ("low", "high"))
    where = "by heart" if summary["closed_book"] else f"up to {summary['longest_prompt_tokens']} tokens"
    figures = f"{summary['exact']['passed']} of {summary['answered']} exact (95 %: {low:.1f} to {high:.1f} %)"
    return f"{figures}, {where}"


def markdown(run: Run, summary: dict[str, Any], pictures: Path) -> str:
    """Figures, heat map, caveats, and what failed."""
    lines = [_counts(summary), "", "| whitespace | passed | lines |", "|---|---|---|"]
    for name in NORMALIZATIONS:
        passed, _, share = _figures(summary[name], summary["answered"]).partition("; lines ")
        lines.append(f"| {_NAMES[name]} | {passed} | {share} |")
    if summary["answered"]:
        lines += ["", *_notes(summary)]
    if summary["cells"]:
        draw_heatmap(summary, pictures / "needle.svg")
        lines += ["", "![exact copies by prompt length and depth](needle.svg)"]
        lines += ["", "| prompt tokens \\ depth | " + " | ".join(f"{depth} %" for depth in summary["depths"]) + " |"]
        lines.append("|---|" + "---|" * len(summary["depths"]))
        lines += [f"| {_thousands(length)} | " + " | ".join(cells) + " |" for length, cells in _table(summary)]
    failed = run.with_status("failed")
    if failed:
        lines += ["", "Failed items (the first 20):", ""]
        lines += [f"- `{item.id}`: {item.why}" for item in failed[:20]]
    return "\n".join(lines) + "\n"


def _counts(summary: dict[str, Any]) -> str:
    planned, answered = summary["items_planned"], summary["answered"]
    what = "functions known by heart (no haystack)" if summary["closed_book"] else "functions copied from the context"
    parts = [f"{what}: {answered} of {planned} items answered" + (" (partial)" if answered < planned else "")]
    if planned < summary["items_asked_for"]:
        parts.append(f"{summary['items_asked_for']} were asked for; the prompts hold no more functions at those depths")
    if summary["request_errors"]:
        parts.append(f"{summary['request_errors']} ended in an error and count neither way")
    return "; ".join(parts)


def _figures(shares: dict[str, Any], answered: int) -> str:
    if shares["interval"] is None:
        return "nothing answered yet"
    low, high = (100 * shares["interval"][end] for end in ("low", "high"))
    figures = f"{shares['passed']}/{answered} = {100 * shares['rate']:.1f} % (95 %: {low:.1f} to {high:.1f})"
    figures += f"; lines {100 * shares['line_share']:.1f} %"
    if shares["line_share_interval"] is None:
        return figures
    low, high = (100 * shares["line_share_interval"][end] for end in ("low", "high"))
    return f"{figures} ({low:.1f} to {high:.1f})"


def _notes(summary: dict[str, Any]) -> list[str]:
    notes = [
        f"An item passes if the answer's last code block (without one, the whole answer) has all {summary['lines']} "
        "lines exactly and in order, and nothing that is not of the same function: its signature and the rest of its "
        "body may come too, other lines and prose may not. Blank lines do not count, all line endings are equal, and "
        "reasoning is not scored."
    ]
    if summary["cells"]:
        notes.append(f"A function's depth is within {summary['depth_tolerance_percent']:g} % of what the table says.")
    if summary["exact"]["passed"] == summary["answered"]:
        failures = 100 * (1 - summary["exact"]["interval"]["low"])
        notes.append(f"No failure in so many items still allows a true failure rate of up to {failures:.1f} %.")
    if summary["cut_by_budget"]:
        notes.append(f"{summary['cut_by_budget']} answers were ended by the answer budget: see --max-tokens.")
    if summary["invented_lines"]:
        notes.append(f"{summary['invented_lines']} lines of the answers are not of the functions asked about.")
    if summary["corpus"].startswith("the standard library"):
        notes.append(MEMORY)
    return [*notes, CARD]


def _table(summary: dict[str, Any]) -> list[tuple[int, list[str]]]:
    cells = {(cell["length"], cell["depth"]): f"{cell['passed']}/{cell['answered']}" for cell in summary["cells"]}
    depths = summary["depths"]
    return [(length, [cells.get((length, depth), "-") for depth in depths]) for length in summary["lengths"]]


def _row(head: str, cells: Sequence[str]) -> str:
    return f"{head:>8} " + " ".join(f"{cell:>5}" for cell in cells)


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
