"""Intervals against published and hand-made figures."""

from __future__ import annotations

import math

import pytest

from step128_evals.stats import bootstrap, mcnemar, mean_interval, ratio_interval, wilcoxon, wilson


@pytest.mark.parametrize(
    ("passed", "total", "low", "high"),
    [
        (100, 100, 0.9630, 1.0),  # what "100/100" allows: 3.7 % of failures
        (0, 10, 0.0, 0.2775),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, table I, score method
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(passed: int, total: int, low: float, high: float) -> None:
    interval = wilson(passed, total)
    assert interval is not None
    assert (interval.low, interval.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_equal_rows_give_no_interval() -> None:
    """All right, or all wrong, in a few rows is no certainty: an interval without width would say so."""
    assert mean_interval([1.0] * 100) is None
    assert ratio_interval([3.0, 6.0], [1.0, 2.0]) is None


def test_wilcoxon() -> None:
    assert wilcoxon([]) == wilcoxon([0.0, 0.0]) == 1.0
    assert wilcoxon([1, 2, 3, 4, 5]) == pytest.approx(2 / 2**5)  # all of one sign: as small as five can be
    assert wilcoxon([1, 2, 3, 4, 5, 6, 0]) == pytest.approx(2 / 2**6)
    assert wilcoxon([1, -2, 3, -4, 5, -6]) > 0.5


def test_nothing_gives_no_interval() -> None:
    assert wilson(0, 0) is None
    assert mean_interval([1.0]) is None


def test_mcnemar() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert mcnemar(1, 7) == mcnemar(7, 1) == pytest.approx(2 * (1 + 8) / 2**8)


def test_bootstrap_covers_a_mean_as_theory_says() -> None:
    values = [float(number % 10) for number in range(1000)]
    interval = mean_interval(values)
    assert interval is not None
    error = math.sqrt(8.25 / 1000)  # the standard error of the mean of the digits
    assert interval.low == pytest.approx(4.5 - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(4.5 + 1.96 * error, abs=0.1 * error)
    assert mean_interval(values) == interval  # the seed is fixed


def test_ratio_draws_rows_together() -> None:
    weights = [1.0, 5.0, 2.0, 9.0]
    near = [2.9 * weights[0], *(3 * weight for weight in weights[1:])]
    interval = ratio_interval(near, weights)
    assert interval is not None and 2.9 <= interval.low < interval.high <= 3.0000001  # drawn apart: 0.5 to 15
    assert bootstrap([[1.0], [1.0]], lambda a, b, axis: a.mean(axis)) is None


@pytest.mark.filterwarnings("error")
def test_a_ratio_to_nothing_has_no_interval() -> None:
    assert ratio_interval([0.0, 0.0], [0.0, 1.0]) is None
    assert ratio_interval([0.0, 0.0], [0.0, 0.0]) is None
