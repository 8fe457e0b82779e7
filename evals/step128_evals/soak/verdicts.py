"""What a soak's items say: errors, leaks, drift, and whether the canary still sings."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy import stats

from step128_evals.runs import Item, Run
from step128_evals.stats import CONFIDENCE, bootstrap

DRIFT = 1.10
"""Medians of the last third may differ from the first's by this factor: requests of a mixed load scatter."""
IDLE_KV_USAGE = 0.01
LEAK_SHARE = 0.02
"""Memory may grow by this share of itself during the soak; a leak must also be told apart from no growth."""

_SETTLING_SHARE = 0.2
_BLOCKS = 20
_FEWEST_BLOCKS = 6
_FEWEST_REQUESTS = 10
_MOST_REQUESTS = 2000

Verdict = dict[str, Any]


def verdict(outcome: str, why: str, **figures: Any) -> Verdict:
    """``outcome``: passed, failed, or unsupported where nothing can be said."""
    return {"outcome": outcome, "why": why, **figures}


def all_verdicts(run: Run) -> dict[str, Verdict]:
    """Every verdict by its name."""
    seconds = soaked_seconds(run)
    return {
        "errors": errors(run),
        "drained": drained(run),
        "memory": memory(run, seconds),
        "drift_first_token": drift(run, seconds, "first_token_seconds"),
        "drift_decode": drift(run, seconds, "decode_tokens_per_second"),
        "canary": canary(run),
    }


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


def errors(run: Run) -> Verdict:
    """Any request without a whole answer."""
    asked = [*requests(run), *of_kind(run, "canary")]
    failed = [item for item in asked if item.status == "failed"]
    if not asked:
        return verdict("unsupported", "nothing was asked yet")
    if not failed:
        return verdict("passed", f"{len(asked)} requests, none failed", failed=0)
    reasons = Counter(item.why for item in failed).most_common(3)
    listed = "; ".join(f"{count} times: {why}" for why, count in reasons)
    return verdict("failed", f"{len(failed)} of {len(asked)} requests failed: {listed}", failed=len(failed))


def drained(run: Run) -> Verdict:
    """After the last request: nothing runs, nothing waits, no block of the KV cache is held."""
    samples = [item.data for item in of_kind(run, "sample") if item.data["drained"]]
    if not samples:
        return verdict("unsupported", "there is no reading of /metrics after the end")
    last = samples[-1]
    held = {name: last[name] for name in ("running", "waiting", "kv_cache_usage")}
    if held["running"] is None:
        return verdict("unsupported", "/metrics does not tell how many requests run")
    cache = "not told" if held["kv_cache_usage"] is None else f"{held['kv_cache_usage']:.1%}"
    shown = f"{held['running']:.0f} running, {held['waiting'] or 0:.0f} waiting, KV cache held: {cache}"
    clean = not held["running"] and not held["waiting"] and (held["kv_cache_usage"] or 0.0) <= IDLE_KV_USAGE
    return verdict("passed" if clean else "failed", f"after the end: {shown}", **held)


def memory(run: Run, seconds: float) -> Verdict:
    """Slope of the process's resident memory, by least squares over block means (samples of one block correlate).

    A leak grows to the end: memory that was taken once, somewhere in the middle, is none.
    """
    samples = [
        (item.data["at"], item.data["resident_bytes"])
        for item in _longest_session(run)
        if item.data["resident_bytes"] is not None and item.data["at"] >= _SETTLING_SHARE * seconds
    ]
    if all(item.data["resident_bytes"] is None for item in of_kind(run, "sample")):
        return verdict("unsupported", "/metrics does not tell the process's memory")
    blocks = [block for block in np.array_split(np.array(samples, dtype=float), _BLOCKS) if len(block)]
    if len(blocks) < _FEWEST_BLOCKS:
        return verdict("unsupported", f"{len(samples)} samples after the first fifth are too few for a slope")
    means = np.array([block.mean(axis=0) for block in blocks])
    low, slope, high = _slope(means)
    mean_mib = means[:, 1].mean() / 2**20
    grown = slope / 3600 * (means[-1, 0] - means[0, 0]) / mean_mib
    leaks = low > 0 and grown > LEAK_SHARE and _slope(means[len(means) // 2 :])[0] > 0
    why = (
        f"{slope:+.1f} MiB an hour [{low:+.1f}, {high:+.1f}], {grown:+.2%} during the soak, "
        f"of {mean_mib:.0f} MiB of the process that answers /metrics"
    )
    interval = {"low": low, "high": high}
    return verdict("failed" if leaks else "passed", why, mib_per_hour=slope, mib_per_hour_interval=interval)


def _slope(points: Any) -> tuple[float, float, float]:
    """Low end, estimate and high end in MiB an hour, of rows of (seconds, bytes)."""
    if np.ptp(points[:, 1]) == 0:
        return 0.0, 0.0, 0.0  # scipy has no standard error then
    fit = stats.linregress(points[:, 0], points[:, 1])
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(points) - 2)) * float(fit.stderr)
    per_hour = 3600 / 2**20
    return float(fit.slope - reach) * per_hour, float(fit.slope) * per_hour, float(fit.slope + reach) * per_hour


def _longest_session(run: Run) -> list[Item]:
    """Samples of the session with the most: between two sessions the server may have been started anew."""
    groups: list[list[Item]] = [[]]
    for item in of_kind(run, "session", "sample"):
        if item.data["kind"] == "session":
            groups.append([])
        else:
            groups[-1].append(item)
    return max(groups, key=len)


def drift(run: Run, seconds: float, figure: str) -> Verdict:
    """Ratio of medians, last third over first, of streamed chats; bootstrap interval."""
    chats = [item.data for item in of_kind(run, "chat") if item.status == "passed"]
    values = [(data["started_at"], _figure(data, figure)) for data in chats]
    thirds = [
        [value for at, value in values if value is not None and start <= at / seconds * 3 < start + 1]
        for start in ((0, 2) if seconds else ())
    ]
    if not thirds or min(map(len, thirds)) < _FEWEST_REQUESTS:
        return verdict("unsupported", f"fewer than {_FEWEST_REQUESTS} streamed chats in the first or the last third")
    first, last = (_thin(values) for values in thirds)
    ratio = statistics.median(last) / statistics.median(first)
    interval = bootstrap([last, first], _ratio_of_medians, paired=False)
    ends = asdict(interval) if interval else {"low": ratio, "high": ratio}
    slower = ends["low"] > DRIFT if figure == "first_token_seconds" else ends["high"] < 1 / DRIFT
    why = f"last third over first: {ratio:.2f} [{ends['low']:.2f}, {ends['high']:.2f}]"
    return verdict("failed" if slower else "passed", why, ratio=ratio, ratio_interval=ends)


def _ratio_of_medians(last: Any, first: Any, axis: int) -> Any:
    return np.median(last, axis=axis) / np.median(first, axis=axis)


def _figure(data: dict[str, Any], name: str) -> float | None:
    if name == "first_token_seconds":
        return float(data[name])
    seconds = data["seconds"] - data["first_token_seconds"]
    return (data["tokens"] - 1) / seconds if data["tokens"] > 1 and seconds > 0 else None


def _thin(values: Sequence[float]) -> list[float]:
    """Evenly fewer of very many: the bootstrap takes their number times its own."""
    return list(values[:: len(values) // _MOST_REQUESTS + 1])


def canary(run: Run) -> Verdict:
    """Whether the canary alone, after the soak, gives an answer that it gave alone before.

    Under load its answers are only counted: requests of one batch are summed in another order than alone, and greedy
    choices between near equals flip. Alone there is no such excuse.
    """
    sung = [item for item in of_kind(run, "canary") if item.status == "passed"]
    before, after = ({item.data["text"] for item in sung if item.data["alone"] == when} for when in ("before", "after"))
    loaded = [item.data["text"] for item in sung if not item.data["alone"]]
    figures = {
        "asked": len(sung),
        "distinct_under_load": len(set(loaded)),
        "as_before_under_load": sum(text in before for text in loaded) / len(loaded) if loaded else None,
    }
    counted = f"under load {len(loaded)} answers, {len(set(loaded))} distinct"
    if not before or not after:
        return verdict("unsupported", f"it was not asked alone both before and after; {counted}", **figures)
    same = bool(after & before)
    shown = "the same answer alone before and after" if same else "alone, none of the answers after is one of before"
    return verdict("passed" if same else "failed", f"{shown}; {counted}", **figures)
