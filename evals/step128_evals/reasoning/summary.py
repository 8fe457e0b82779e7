"""Figures of a run of ``reasoning``: how much was thought at each level, and whether the levels differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from step128_evals.runs import Item, Run
from step128_evals.stats import mean_interval, wilcoxon, wilson
from step128_evals.tables import columns, markdown_table, number, with_interval

LEVELS = ("low", "medium", "high")
UNITS = {
    "usage_tokens": "tokens (the server's own count of reasoning)",
    "tokenizer_tokens": "tokens (the reasoning, by the server's tokenizer)",
    "characters": "characters (the server counts no reasoning tokens and has no tokenizer)",
}
FEWEST_PAIRS = 6
"""With fewer, the signed-rank test cannot reach :data:`SIGNIFICANCE`, and a bootstrap interval says nothing."""

SIGNIFICANCE = 0.05


def summarize(run: Run) -> dict[str, Any]:
    """Reasoning by level, with bootstrap intervals of the means; the levels in pairs, by the problems that both have.

    ``changes``: whether the mean difference between the least and the greatest level is beyond chance: its bootstrap
    interval excludes zero, and the signed-rank test says so too.
    """
    # By id, not as they were finished: the bootstrap's draws depend on the order.
    items = sorted(run.with_status("passed", "failed"), key=lambda item: item.id)
    unit = _unit(items)
    lengths = {
        level: {i.data["problem"]: _length(i, unit) for i in items if i.data["level"] == level} for level in LEVELS
    }
    levels = {level: _level(items, level, list(lengths[level].values())) for level in LEVELS if lengths[level]}
    pairs = {f"{a}_to_{b}": _pair(lengths[a], lengths[b]) for a, b in combinations(levels, 2)}
    means = [row["mean"] for row in levels.values()]
    widest = pairs.get(f"{next(iter(levels))}_to_{list(levels)[-1]}") if len(levels) > 1 else None
    return {
        "planned": run.manifest.items_total,
        "missing": run.missing,
        "unit": UNITS[unit],
        "levels": levels,
        "pairs": pairs,
        "monotone": all(a < b for a, b in pairwise(means)) if len(means) > 1 else None,
        "changes": widest["changes"] if widest else None,
        "verdict": _verdict(means, widest),
        "leaked": sum(item.data["leaked"] for item in items),
        "truncated": sum(item.data["truncated"] for item in items),
        "unsupported": sorted({item.why for item in run.with_status("unsupported")}),
    }


def score(run: Run) -> dict[str, float]:
    """1.0 for a right answer, 0.0 for a wrong one: two runs are compared by that, levels within one run by length."""
    return {item.id: float(item.status == "passed") for item in run.with_status("passed", "failed")}


def _unit(items: Sequence[Item]) -> str:
    """The best measure that all items have; a server that counts none while it shows some does not count."""
    measures = [item.data["reasoning"] for item in items]
    for unit in ("usage_tokens", "tokenizer_tokens"):
        values = [measure[unit] for measure in measures]
        if values and None not in values and (any(values) or not any(measure["characters"] for measure in measures)):
            return unit
    return "characters"


def _length(item: Item, unit: str) -> float:
    return float(item.data["reasoning"][unit])


def _level(items: Sequence[Item], level: str, lengths: Sequence[float]) -> dict[str, Any]:
    own = [item for item in items if item.data["level"] == level]
    correct = sum(item.data["correct"] for item in own)
    interval, share = mean_interval(lengths), wilson(correct, len(own))
    return {
        "items": len(own),
        "mean": float(np.mean(lengths)),
        "interval": asdict(interval) if interval else None,
        "median": float(np.median(lengths)),
        "lengths": list(lengths),
        "correct": correct,
        "correct_share": correct / len(own),
        "correct_interval": asdict(share) if share else None,
        "truncated": sum(item.data["truncated"] for item in own),
    }


def _pair(less: dict[str, float], more: dict[str, float]) -> dict[str, Any]:
    """Of the same problems at two levels: mean difference, its interval, and Wilcoxon's signed-rank test (1945)."""
    differences = [more[problem] - less[problem] for problem in less if problem in more]
    enough = len(differences) >= FEWEST_PAIRS
    interval = mean_interval(differences) if enough else None  # None too if all differences are equal
    excludes_zero = interval is None or interval.low > 0 or interval.high < 0
    p_value = wilcoxon(differences) if enough else None
    return {
        "pairs": len(differences),
        "mean_difference": float(np.mean(differences)) if differences else None,
        "interval": asdict(interval) if interval else None,
        "wilcoxon_p": p_value,
        "longer": sum(difference > 0 for difference in differences),
        "shorter": sum(difference < 0 for difference in differences),
        "changes": None if p_value is None else excludes_zero and p_value < SIGNIFICANCE,
    }


def _verdict(means: Sequence[float], widest: dict[str, Any] | None) -> str:
    if widest is None or widest["changes"] is None:
        return f"cannot be said: fewer than {FEWEST_PAIRS} problems were answered at two levels"
    if not any(means):
        return "the endpoint takes reasoning_effort and shows no reasoning at any level"
    if not widest["changes"]:
        return "no change of the amount of thinking was measured: the difference may be chance"
    if widest["mean_difference"] < 0:
        return "the level changes the amount of thinking, but the wrong way: more effort thinks less"
    return "the level changes the amount of thinking"


def text(summary: dict[str, Any]) -> str:
    """For a terminal."""
    return "\n".join(part for part in _parts(summary, columns) if part)


def headline(summary: dict[str, Any]) -> str:
    """One line for a table."""
    means = " / ".join(f"{row['mean']:.0f}" for row in summary["levels"].values())
    levels = "/".join(summary["levels"])
    return f"{summary['verdict']} ({levels}: {means} {summary['unit'].split(' (')[0]})" if means else "nothing answered"


def markdown(run: Run, summary: dict[str, Any], pictures: Path) -> str:
    """A report's section, with a box plot by level."""
    from step128_evals.reasoning.pictures import draw_boxes

    parts = list(_parts(summary, markdown_table))
    if summary["levels"]:
        lengths = {level: row["lengths"] for level, row in summary["levels"].items()}
        draw_boxes(lengths, summary["unit"].split(" (")[0], run.manifest.model, pictures / "reasoning.svg")
        parts.append("![reasoning by level](reasoning.svg)")
    return "\n\n".join(part for part in parts if part) + "\n"


def _parts(summary: dict[str, Any], table: Any) -> Iterator[str]:
    if summary["missing"]:
        yield f"Not whole: {summary['missing']} of {summary['planned']} questions have no outcome yet."
    yield f"Verdict: {summary['verdict']}."
    yield f"Unit: {summary['unit']}. Brackets are 95 % intervals: bootstrap of means, Wilson of shares."
    rows = [("level", "questions", "mean reasoning", "median", "right answers", "cut off")]
    for level, row in summary["levels"].items():
        right = with_interval(100 * row["correct_share"], _times_100(row["correct_interval"]), 0) + " %"
        mean = with_interval(row["mean"], row["interval"], 1)
        rows.append((level, str(row["items"]), mean, f"{row['median']:.0f}", right, str(row["truncated"])))
    yield table(rows)
    rows = [("change", "pairs", "mean difference", "longer", "shorter", "Wilcoxon p")]
    for name, row in summary["pairs"].items():
        mean = with_interval(row["mean_difference"], row["interval"], 1)
        cells = (str(row["longer"]), str(row["shorter"]), number(row["wilcoxon_p"], 4))
        rows.append((name.replace("_", " "), str(row["pairs"]), mean, *cells))
    yield table(rows)
    if summary["monotone"] is not None:
        yield f"The means {'rise' if summary['monotone'] else 'do not rise'} from level to level."
    if summary["truncated"]:
        yield f"Cut off at --max-tokens, their reasoning counted as far as it came: {summary['truncated']} answers."
    if summary["leaked"]:
        yield f"Reasoning, or its marks, in the text of the answer: {summary['leaked']} answers."
    yield from (f"Unsupported: {why}" for why in summary["unsupported"])


def _times_100(interval: dict[str, float] | None) -> dict[str, float] | None:
    return {name: 100 * value for name, value in interval.items()} if interval else None
