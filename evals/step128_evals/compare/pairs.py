"""Compare two result files of one eval by the items that both have."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from step128_evals.errors import BadInputError
from step128_evals.evaluation import summary_of
from step128_evals.runs import Run
from step128_evals.stats import CONFIDENCE, Interval, bootstrap, mcnemar, mean_interval, wilcoxon

LOWER_IS_BETTER = frozenset({"ppl"})
HOW_IT_WAS_ASKED = frozenset(
    {"dialect", "dtype", "device", "reference", "top_k", "token_counts", "thinking", "text", "corpus"}
)
"""Settings of how a server is asked, and labels of texts, which their SHA-256 tells apart."""

SIGNIFICANCE = round(1 - CONFIDENCE, 6)


@dataclass(frozen=True)
class Comparison:
    """``difference``: mean of (after - before) over ``pairs`` items, with its bootstrap interval. For items that pass
    or fail: ``gained`` fail before and pass after, ``lost`` the other way. ``p_value``: McNemar's exact test for these,
    else Wilcoxon's signed-rank test, which decides the ``verdict``: better, worse, or "cannot be told apart".
    ``ratio``: geometric mean of after / before where all figures are above 0. ``unpaired``: items that only one of the
    files has."""

    eval: str
    before: str
    after: str
    pairs: int
    unpaired: int
    before_mean: float
    after_mean: float
    difference: float
    difference_interval: Interval | None
    ratio: float | None
    ratio_interval: Interval | None
    gained: int | None
    lost: int | None
    p_value: float
    test: str
    verdict: str

    @property
    def worse(self) -> bool:
        """Whether the second run is worse beyond chance."""
        return self.verdict == "worse"


def compare_runs(before: Run, after: Run) -> Comparison:
    """Compare by :meth:`Summary.score`.

    Raises:
        BadInputError: different evals or settings, or no item in common.
    """
    _refuse_other_questions(before, after)
    module = summary_of(before.manifest.eval)
    old, new = module.score(before), module.score(after)
    ids = [id for id in old if id in new]
    if not ids:
        raise BadInputError(f"{before.path} and {after.path} have no scored item in common")
    first = np.array([old[id] for id in ids], dtype=np.float64)
    second = np.array([new[id] for id in ids], dtype=np.float64)
    binary = bool(np.isin(np.concatenate([first, second]), (0.0, 1.0)).all())
    gained = int(((first == 0) & (second == 1)).sum()) if binary else None
    lost = int(((first == 1) & (second == 0)).sum()) if binary else None
    differences = [float(value) for value in second - first]
    p_value = wilcoxon(differences) if gained is None or lost is None else mcnemar(gained, lost)
    ratio = None if binary else _ratio(first, second)
    return Comparison(
        eval=before.manifest.eval,
        before=str(before.path),
        after=str(after.path),
        pairs=len(ids),
        unpaired=len(old.keys() ^ new.keys()),
        before_mean=float(first.mean()),
        after_mean=float(second.mean()),
        difference=float((second - first).mean()),
        difference_interval=mean_interval(differences),
        ratio=ratio[0] if ratio else None,
        ratio_interval=ratio[1] if ratio else None,
        gained=gained,
        lost=lost,
        p_value=p_value,
        test="McNemar's exact test" if binary else "Wilcoxon's signed-rank test",
        verdict=_verdict(before.manifest.eval, differences, p_value),
    )


def _ratio(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[float, Interval | None] | None:
    if first.min() <= 0 or second.min() <= 0:
        return None
    logs = np.log(second / first)
    interval = bootstrap([logs.tolist()], lambda values, axis: np.exp(np.mean(values, axis=axis)))
    return float(np.exp(logs.mean())), interval


def _verdict(eval_name: str, differences: list[float], p_value: float) -> str:
    if p_value >= SIGNIFICANCE:
        return "cannot be told apart"
    return "worse" if (sum(differences) > 0) == (eval_name in LOWER_IS_BETTER) else "better"


def _refuse_other_questions(before: Run, after: Run) -> None:
    one, other = before.manifest, after.manifest
    if one.eval != other.eval:
        raise BadInputError(f"{before.path} is of the eval {one.eval}, {after.path} of {other.eval}")
    names = (one.settings | other.settings).keys() - HOW_IT_WAS_ASKED
    different = sorted(name for name in names if one.settings.get(name) != other.settings.get(name))
    if different:
        name = different[0]
        values = [json.dumps(run.settings.get(name))[:100] for run in (one, other)]
        raise BadInputError(
            f"{before.path} and {after.path} did not ask the same: {name} is {values[0]} and {values[1]}"
            + (f" ({len(different) - 1} more settings differ)" if len(different) > 1 else "")
        )
