"""Whether a server becomes slower during a soak."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from step128_evals.runs import Run
from step128_evals.soak.items import Verdict, of_kind, verdict
from step128_evals.stats import bootstrap

DRIFT = 1.10
"""Medians of the last third may be worse than the first's by this factor."""

_FEWEST_REQUESTS = 10
_MOST_REQUESTS = 2000


def drift(run: Run, seconds: float, figure: str) -> Verdict:
    """Ratio of medians, last third over first, of streamed chats; bootstrap interval.

    Passed if the whole interval is within :data:`DRIFT`, failed if the whole is beyond it.
    """
    chats = [item.data for item in of_kind(run, "chat") if item.status == "passed"]
    values = [(data["started_at"], _figure(data, figure)) for data in chats]
    thirds = [
        [value for at, value in values if value is not None and start <= at / seconds * 3 < start + 1]
        for start in ((0, 2) if seconds else ())
    ]
    if not thirds or min(map(len, thirds)) < _FEWEST_REQUESTS:
        return verdict("unsupported", f"fewer than {_FEWEST_REQUESTS} streamed chats in the first or the last third")
    first, last = (_thin(values) for values in thirds)
    if statistics.median(first) == 0:
        return verdict("unsupported", "half the chats of the first third took no time at all: there is no ratio to it")
    ratio = statistics.median(last) / statistics.median(first)
    interval = bootstrap([last, first], _ratio_of_medians, paired=False)
    if interval is None:
        return verdict("unsupported", f"last third over first: {ratio:.2f}; it has no interval", ratio=ratio)
    waits = figure == "first_token_seconds"
    limit = DRIFT if waits else 1 / DRIFT
    # Both as times: how much longer at best and at worst.
    best, worst = (interval.low, interval.high) if waits else (1 / interval.high, 1 / interval.low)
    outcome = "passed" if worst <= DRIFT else "failed" if best > DRIFT else "unsupported"
    shown = f"last third over first: {ratio:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
    why = f"{shown}; the limit is {'at most' if waits else 'at least'} {limit:.2f}"
    if outcome == "unsupported":
        why += f": {len(first)} and {len(last)} are too few chats to tell; soak longer"
    return verdict(outcome, why, ratio=ratio, ratio_interval=asdict(interval), ratio_limit=limit)


def _ratio_of_medians(last: Any, first: Any, axis: int) -> Any:
    return np.median(last, axis=axis) / np.median(first, axis=axis)


def _figure(data: dict[str, Any], name: str) -> float | None:
    """None: an answer that showed nothing has no time after its first token, and no decoding speed."""
    if name == "first_token_seconds":
        return float(data[name])
    seconds = data["seconds"] - data["first_token_seconds"]
    return (data["tokens"] - 1) / seconds if data["tokens"] > 1 and seconds > 0 else None


def _thin(values: Sequence[float]) -> list[float]:
    """Evenly fewer of very many: the bootstrap takes their number times its own."""
    return list(values[:: len(values) // _MOST_REQUESTS + 1])
