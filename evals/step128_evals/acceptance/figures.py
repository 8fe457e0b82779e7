"""Rates, accepted lengths and speeds of a group of prompts, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from step128_evals.runs import Item, Run
from step128_evals.stats import Interval, ratio_interval, wilson


def figures(items: Sequence[Item], positions: int) -> dict[str, Any]:
    """Figures of measured prompts.

    ``rate`` of a position is cumulative, as vLLM calls it "per position": drafts accepted there over all drafts, which
    includes that the positions before held. ``conditional`` is over the drafts whose position before was accepted.

    Args:
        items: of ``acceptance`` runs.
        positions: drafted tokens a step; 0 without speculative decoding.
    """
    data = [item.data for item in items]
    drafts = [float(row["drafts"]) for row in data]
    accepted = [[float((row["accepted"] + [0] * positions)[i]) for row in data] for i in range(positions)]
    by_position: dict[str, Any] = {}
    for index in range(positions):
        rate, rate_interval = share(accepted[index], drafts)
        conditional, interval = share(accepted[index], accepted[index - 1] if index else drafts)
        by_position[str(index + 1)] = {
            "rate": rate,
            "rate_interval": rate_interval,
            "conditional": conditional,
            "conditional_interval": interval,
        }
    gained = [sum(column[row] for column in accepted) for row in range(len(data))]
    length, length_interval = ratio([a + b for a, b in zip(gained, drafts, strict=True)], drafts)
    decoded = [row for row in data if decode_speed(row) is not None]
    decode, decode_interval = ratio(
        [float(row["tokens"] - 1) for row in decoded], [row["seconds"] - row["first_token_seconds"] for row in decoded]
    )
    overall, overall_interval = ratio([float(row["tokens"]) for row in data], [row["seconds"] for row in data])
    return {
        "prompts": len(data),
        "drafts": int(sum(drafts)),
        "generated_tokens": sum(row["tokens"] for row in data),
        "seconds": sum(row["seconds"] for row in data),
        "positions": by_position,
        "mean_accepted_length": length,
        "mean_accepted_length_interval": length_interval,
        "decode_tokens_per_second": decode,
        "decode_tokens_per_second_interval": decode_interval,
        "tokens_per_second": overall,
        "tokens_per_second_interval": overall_interval,
    }


def decode_speed(row: dict[str, Any]) -> float | None:
    """Tokens after the first over the seconds after the first.

    None if nothing came after it: one token, or an answer that showed nothing before its end.
    """
    seconds = row["seconds"] - row["first_token_seconds"]
    return float((row["tokens"] - 1) / seconds) if seconds > 0 and row["tokens"] > 1 else None


def drafted_depth(run: Run) -> int | None:
    """Tokens drafted a step: what the server told when the run began, or else the most positions of any prompt.

    None if it does not count drafts at all.
    """
    measured = run.with_status("measured")
    told = run.manifest.settings["num_speculative_tokens"]
    # A server of another kind may tell only in its counters that it drafts.
    found = max((len(item.data["accepted"]) for item in measured), default=0)
    if told is None and not found:
        return 0 if measured and all(item.data.get("counts_drafts") for item in measured) else None
    return max(told or 0, found)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float | None, dict[str, float] | None]:
    """Sum over sum, and its bootstrap interval over prompts, if there is one."""
    if not sum(denominators):
        return None, None
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may hold only prompts without a draft
        interval = ratio_interval(numerators, denominators)
    return sum(numerators) / sum(denominators), as_json(interval)


def share(accepted: Sequence[float], drafts: Sequence[float]) -> tuple[float | None, dict[str, float] | None]:
    """The same of a share; where all prompts agree (none or all accepted) the interval is Wilson's over drafts."""
    value, interval = ratio(accepted, drafts)
    if value is not None and (interval is None or interval["low"] == interval["high"]):
        interval = as_json(wilson(int(sum(accepted)), int(sum(drafts))))
    return value, interval


def as_json(interval: Interval | None) -> dict[str, float] | None:
    """``{"low":, "high":}``; None without an interval, or without a finite one."""
    if interval is None or not np.isfinite([interval.low, interval.high]).all():
        return None
    return asdict(interval)
