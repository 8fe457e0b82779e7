"""A result file of ``depth`` as figures, text and curves."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from step128_evals.acceptance.figures import decode_speed
from step128_evals.runs import Item, Run
from step128_evals.tables import columns, markdown_table

NOTES = (
    "Figures are median (least to most) of what was measured, no confidence intervals: first token and decoding over "
    "all requests, the others over the repeats. With several requests at once the first token waits for the prefill of "
    "the others too, which also slows those that decode already; prefill is of all together: their prompt tokens over "
    "the time until the last of them had its first token. At depth 0 the prompt is a header of a few dozen tokens: its "
    "first token is latency, so there is no prefill speed."
)

_CACHED_SHARE = 0.05  # the first tokens of two headers may be equal by chance


def summarize(run: Run) -> dict[str, Any]:
    """``cells.KIND.DEPTH.CONCURRENCY``: each figure's least, median and most."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    groups: dict[tuple[str, int, int], list[Item]] = {}
    for item in run.with_status("measured"):
        key = (item.data["kind"], item.data["depth_tokens"], item.data["concurrency"])
        groups.setdefault(key, []).append(item)
    for (kind, depth, concurrency), items in sorted(
        groups.items(), key=lambda group: (group[0][0] != "cold", group[0])
    ):
        cells.setdefault(kind, {}).setdefault(str(depth), {})[str(concurrency)] = cell_figures(items)
    return {
        "cells": cells,
        "exact": run.manifest.settings["exact"],
        "output_tokens": run.manifest.settings["output_tokens"],
        "unsupported": {item.id: item.why for item in run.with_status("unsupported")},
        "others_would_show": all(item.data["others_would_show"] for item in run.with_status("measured")),
        "missing": run.missing,
    }


def cell_figures(items: list[Item]) -> dict[str, Any]:
    """Figures of one cell from its repeats."""
    requests = [request for item in items for request in item.data["requests"]]
    cached = [item.data["cached_prompt_tokens"] for item in items]
    prompt_tokens = [request["prompt_tokens"] for request in requests if request["prompt_tokens"] is not None]
    known = None not in cached and len(prompt_tokens) == len(requests) and sum(prompt_tokens) > 0
    return {
        "repeats": len(items),
        "prompt_tokens": _spread(prompt_tokens),
        "generated_tokens": _spread(request["tokens"] for request in requests),
        "first_token_seconds": _spread(map(_first_token, requests)),
        "prefill_tokens_per_second": _spread(map(_prefill, items)),
        "decode_tokens_per_second": _spread(map(decode_speed, requests)),
        "total_tokens_per_second": _spread(_total(item) for item in items),
        "unseen_answers": sum(_first_token(request) is None for request in requests),
        "cached_share": sum(cached) / sum(prompt_tokens) if known else None,
    }


def _first_token(request: dict[str, Any]) -> float | None:
    """Seconds; None if an answer of several tokens showed nothing before its end, so that nobody saw the first."""
    unseen = request["tokens"] > 1 and request["seconds"] <= request["first_token_seconds"]
    return None if unseen else float(request["first_token_seconds"])


def _prefill(item: Item) -> float | None:
    tokens = [request["prompt_tokens"] for request in item.data["requests"]]
    firsts = [first for request in item.data["requests"] if (first := _first_token(request))]
    if item.data["depth_tokens"] == 0 or None in tokens or len(firsts) < len(tokens):
        return None
    return float(sum(tokens) / max(firsts))


def _total(item: Item) -> float:
    """Generated tokens of all requests over the wall clock, prefill included."""
    return float(sum(request["tokens"] for request in item.data["requests"]) / item.data["seconds"])


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    found = [value for value in values if value is not None]
    if not found:
        return None
    return {"min": min(found), "median": statistics.median(found), "max": max(found)}


def text(summary: dict[str, Any]) -> str:
    """A table of the cells."""
    lines = [columns(_rows(summary)), "", NOTES] if summary["cells"] else ["No cell was measured."]
    return "\n".join([*lines, *_remarks(summary)])


def headline(summary: dict[str, Any]) -> str:
    """The deepest cold cell with the fewest requests."""
    cold = summary["cells"].get("cold")
    if not cold:
        return "no cell was measured"
    depth = max(cold, key=int)
    concurrency = min(cold[depth], key=int)
    cell = cold[depth][concurrency]
    speed = _shown(cell["decode_tokens_per_second"], 1)
    return (
        f"{depth} tokens deep, {concurrency} at once: first token after {_shown(cell['first_token_seconds'], 2)} s, "
        + (f"then {speed} tokens/s")
    )


def markdown(run: Run, summary: dict[str, Any], pictures: Path) -> str:
    """The table and the curves."""
    from step128_evals.depth.pictures import draw_curves

    if not summary["cells"]:
        return "\n\n".join(["No cell was measured.", *_remarks(summary)])
    draw_curves(summary, pictures / "depth.svg")
    parts = [markdown_table(_rows(summary)), "![speed by depth](depth.svg)", NOTES, *_remarks(summary)]
    return "\n\n".join(parts)


def score(run: Run) -> dict[str, float]:
    """Median decode speed of a cell's requests, tokens a second."""
    found = {}
    for item in run.with_status("measured"):
        speeds = [speed for request in item.data["requests"] if (speed := decode_speed(request)) is not None]
        if speeds:
            found[item.id] = statistics.median(speeds)
    return found


def _rows(summary: dict[str, Any]) -> list[list[str]]:
    head = ["prompts", "depth", "at once", "repeats", "first token, s", "prefill, tokens/s"]
    rows = [[*head, "decoding, tokens/s each", "generated in all, tokens/s", "from cache"]]
    for kind, depths in summary["cells"].items():
        for depth, concurrencies in depths.items():
            for concurrency, cell in concurrencies.items():
                share = cell["cached_share"]
                rows.append(
                    [
                        "new" if kind == "cold" else kind,
                        depth,
                        concurrency,
                        str(cell["repeats"]),
                        _shown(cell["first_token_seconds"], 2),
                        _shown(cell["prefill_tokens_per_second"], 0),
                        _shown(cell["decode_tokens_per_second"], 1),
                        _shown(cell["total_tokens_per_second"], 1),
                        "-" if share is None else f"{share:.0%}",
                    ]
                )
    return rows


def _shown(spread: dict[str, float] | None, digits: int) -> str:
    if spread is None:
        return "-"
    median, least, most = (f"{spread[name]:.{digits}f}" for name in ("median", "min", "max"))
    return median if least == most else f"{median} ({least} to {most})"


def _remarks(summary: dict[str, Any]) -> list[str]:
    remarks = []
    if not summary["exact"]:
        remarks.append("Prompts went as text through the chat, about as long as wanted: the server has no tokenizer.")
    cells = [cell for depths in summary["cells"].values() for row in depths.values() for cell in row.values()]
    if cells and not summary["others_would_show"]:
        remarks.append("Whether others used the server meanwhile cannot be told: its /metrics do not say, or are none.")
    if any(cell["unseen_answers"] for cell in cells):
        remarks.append("Answers that showed nothing before their end are in no figure of first token and decoding.")
    short = [cell for cell in cells if cell["generated_tokens"]["min"] < summary["output_tokens"]]
    if short:
        remarks.append(f"In {len(short)} cells an answer ended before {summary['output_tokens']} tokens.")
    cold = [cell["cached_share"] for row in summary["cells"].get("cold", {}).values() for cell in row.values()]
    if any(share is not None and share > _CACHED_SHARE for share in cold):
        remarks.append(
            "A part of prompts that should be new came from the prefix cache: their first tokens came early."
        )
    if summary["missing"]:
        remarks.append(f"Items still missing: {summary['missing']}.")
    return [*remarks, *(f"Unsupported: {why}." for why in summary["unsupported"].values())]
