"""Whether the process that answers ``/metrics`` leaks memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from step128_evals.runs import Item, Run
from step128_evals.soak.items import Verdict, of_kind, verdict
from step128_evals.stats import CONFIDENCE

LEAK_SHARE_PER_HOUR = 0.01
LEAK_MIB_PER_HOUR = 64.0
"""A leak is faster than both: that share of the process's own size an hour, and so many MiB an hour."""

_SHORTEST_SECONDS = 300.0  # a server that warms up grows as fast as one that leaks
_SETTLING_SHARE = 0.2
_BLOCKS = 20
_FEWEST_BLOCKS = 6


def memory(run: Run, seconds: float) -> Verdict:
    """Slope of the process's resident memory, by least squares over block means (samples of one block correlate).

    Failed if the interval's low end is above both limits, over all samples after the first fifth and over the second
    half of them: a leak grows to the end, and memory that was taken once, before that half, is none. Passed if the
    high end is within the limits; unsupported where the interval holds the limit.
    """
    samples = [
        (item.data["at"], item.data["resident_bytes"])
        for item in _longest_session(run)
        if item.data["resident_bytes"] is not None and item.data["at"] >= _SETTLING_SHARE * seconds
    ]
    if all(item.data["resident_bytes"] is None for item in of_kind(run, "sample")):
        return verdict("unsupported", "/metrics does not tell the process's memory")
    blocks = [block for block in np.array_split(np.array(samples, dtype=float), _BLOCKS) if len(block)]
    if len(blocks) < _FEWEST_BLOCKS or samples[-1][0] - samples[0][0] < _SHORTEST_SECONDS:
        needed = f"a slope needs {_FEWEST_BLOCKS} over {_SHORTEST_SECONDS / 60:g} minutes"
        return verdict(
            "unsupported", f"{len(samples)} samples after the first fifth are too few: {needed}; soak longer"
        )
    means = np.array([block.mean(axis=0) for block in blocks])
    middle = len(means) // 2
    low, slope, high = _slope(means)
    late_low, _, late_high = _slope(means[middle:])
    mean_mib = float(means[:, 1].mean()) / 2**20
    limit = max(LEAK_SHARE_PER_HOUR * mean_mib, LEAK_MIB_PER_HOUR)
    if low > limit and late_low > limit:
        outcome, told = "failed", "it grows to the end"
    elif low > limit and late_high <= limit:
        taken = (means[middle:, 1].mean() - means[0, 1]) / 2**20
        outcome, told = "passed", f"{taken:+.0f} MiB were taken in the first half, and no more in the second"
    elif high <= limit and late_low <= limit:
        outcome, told = "passed", "within the limit"
    else:
        outcome, told = "unsupported", "too uncertain to tell: soak longer"
    why = (
        f"{told}: {slope:+.1f} MiB an hour [{low:+.1f}, {high:+.1f}], in the second half [{late_low:+.1f}, "
        f"{late_high:+.1f}], of {mean_mib:.0f} MiB of the process that answers /metrics; a leak is more than "
        f"{LEAK_SHARE_PER_HOUR:.0%} and {LEAK_MIB_PER_HOUR:.0f} MiB an hour, so {limit:.1f} MiB"
    )
    interval = {"low": low, "high": high}
    return verdict(outcome, why, mib_per_hour=slope, mib_per_hour_interval=interval, mib_per_hour_limit=limit)


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
