"""How sure a figure is: intervals and paired tests, by scipy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 42


@dataclass(frozen=True)
class Interval:
    """A confidence interval of :data:`CONFIDENCE`."""

    low: float
    high: float


def wilson(passed: int, total: int) -> Interval | None:
    """Wilson's score interval of a share (Wilson 1927): unlike the normal one it holds at 0 and at 100 %.

    100 of 100 gives a lower bound of 0.963: up to 3.7 % of failures would be compatible with it. None without items.
    """
    if not total:
        return None
    interval = stats.binomtest(passed, total).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def bootstrap(
    columns: Sequence[Sequence[float]], statistic: Callable[..., NDArray[np.float64]], paired: bool = True
) -> Interval | None:
    """Percentile bootstrap interval (Efron 1979) of a statistic, with a fixed seed.

    Args:
        columns: samples of equal length if paired; row i of all of them is drawn together.
        statistic: from the columns, with an ``axis`` argument, as :func:`scipy.stats.bootstrap` takes it.
        paired: whether row i of each column belongs together.

    Returns:
        None if there are fewer than two rows, a resample has no value of the statistic (a ratio to 0), or all resamples
        have the same, which tells of too few rows and not of certainty.
    """
    if min(len(column) for column in columns) < 2:
        return None
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            [np.asarray(column, dtype=np.float64) for column in columns],
            statistic,
            paired=paired,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=256,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(SEED),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return Interval(low, high) if np.isfinite([low, high]).all() and low < high else None


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Bootstrap interval of a mean."""
    return bootstrap([values], np.mean)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Interval | None:
    """Bootstrap interval of sum(numerators) / sum(denominators), rows drawn together (chunks of a text, say)."""
    return bootstrap([numerators, denominators], lambda a, b, axis: np.sum(a, axis=axis) / np.sum(b, axis=axis))


def wilcoxon(differences: Sequence[float]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test (Wilcoxon 1945) that paired differences lie around zero.

    Below six differences it cannot fall under 0.05, which a bootstrap of so few would.
    """
    changed = [difference for difference in differences if difference]
    return float(stats.wilcoxon(changed).pvalue) if changed else 1.0


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p-value (McNemar 1947) of a paired comparison.

    Args:
        gained: items that failed before and pass now.
        lost: items that passed before and fail now.
    """
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
