"""The items of a soak, and what a verdict is."""

from __future__ import annotations

from typing import Any

from step128_evals.runs import Item, Run

Verdict = dict[str, Any]


def verdict(outcome: str, why: str, **figures: Any) -> Verdict:
    """``outcome``: passed, failed, or unsupported where nothing can be said."""
    return {"outcome": outcome, "why": why, **figures}


def soaked_seconds(run: Run) -> float:
    """How long the soak lasted so far, pauses left out."""
    last = max((item.data.get("at", 0.0) for item in run.items.values()), default=0.0)
    return float(min(last, run.manifest.settings["minutes"] * 60))


def of_kind(run: Run, *kinds: str) -> list[Item]:
    """Items of these kinds, in the order in which they ended."""
    return [item for item in run.items.values() if item.data.get("kind") in kinds]


def requests(run: Run) -> list[Item]:
    """All requests but canaries."""
    return [item for id, item in run.items.items() if id.startswith("request-")]
