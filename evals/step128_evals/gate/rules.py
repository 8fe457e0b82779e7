"""Read the thresholds, and hold result files against them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from step128_evals.compare.pairs import compare_runs
from step128_evals.errors import BadInputError
from step128_evals.evaluation import SUMMARIES, summarize
from step128_evals.files import read_text
from step128_evals.runs import Run

_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "at_least": (">=", operator.ge),
    "at_most": ("<=", operator.le),
    "equals": ("=", operator.eq),
}


@dataclass(frozen=True)
class Rule:
    """One gate of the YAML: a figure of an eval's summary, by its dotted name, with one bound; or
    ``not_worse_than_baseline``. ``why`` is for the reader. ``optional``: an eval that was not run, or that the endpoint
    does not support, is not held against it. ``allow_unsupported``: nor are the items that it does not support, of a
    context shorter than the longest that is asked, say; else a run with any of them does not pass."""

    eval: str
    figure: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    equals: float | str | bool | None = None
    not_worse_than_baseline: bool = False
    optional: bool = False
    allow_unsupported: bool = False
    why: str = ""

    def __str__(self) -> str:
        if self.not_worse_than_baseline:
            return f"{self.eval} not worse than the baseline"
        name = next(name for name in _BOUNDS if getattr(self, name) is not None)
        return f"{self.eval}.{self.figure} {_BOUNDS[name][0]} {getattr(self, name)}"


@dataclass(frozen=True)
class Verdict:
    """``outcome``: passed, failed or skipped; ``found`` is what was measured, or why there is nothing."""

    rule: str
    outcome: str
    found: str
    why: str


def read_rules(path: Path) -> list[Rule]:
    """Read ``gates:``, a list of mappings with the fields of :class:`Rule`.

    Raises:
        BadInputError: not such a YAML; the message names the entry.
    """
    try:
        document = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError) as error:  # a date that no calendar has
        raise BadInputError(f"{path} is no YAML: {error}") from error
    entries = document.get("gates") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise BadInputError(f"{path} needs a list under 'gates'")
    return [_rule(path, number, entry) for number, entry in enumerate(entries, start=1)]


def _rule(path: Path, number: int, entry: Any) -> Rule:
    names = {field.name for field in fields(Rule)}
    if not isinstance(entry, dict) or not isinstance(entry.get("eval"), str) or entry["eval"] not in SUMMARIES:
        raise BadInputError(f"{path}, gate {number}: 'eval' must be one of {', '.join(SUMMARIES)}")
    if unknown := sorted(entry.keys() - names):
        raise BadInputError(f"{path}, gate {number}: {unknown[0]!r} is not one of {', '.join(sorted(names))}")
    for name in ("optional", "allow_unsupported", "not_worse_than_baseline"):
        if not isinstance(entry.get(name, False), bool):
            raise BadInputError(f"{path}, gate {number}: {name} must be true or false, not {entry[name]!r}")
    if not isinstance(entry.get("why", ""), str):
        raise BadInputError(f"{path}, gate {number}: why must be a text, not {entry['why']!r}")
    bounds = [name for name in _BOUNDS if entry.get(name) is not None]
    if entry.get("not_worse_than_baseline"):
        if bounds or "figure" in entry:
            raise BadInputError(f"{path}, gate {number}: not_worse_than_baseline takes no figure and no bound")
    elif len(bounds) != 1 or not isinstance(entry.get("figure"), str):
        raise BadInputError(f"{path}, gate {number}: a 'figure' and one of {', '.join(_BOUNDS)} are needed")
    elif bounds[0] != "equals" and not _is_number(entry[bounds[0]]):
        raise BadInputError(f"{path}, gate {number}: {bounds[0]} must be a number, not {entry[bounds[0]]!r}")
    return Rule(**entry)


def check_rules(rules: Sequence[Rule], runs: Sequence[Run], baselines: Sequence[Run]) -> list[Verdict]:
    """Hold every rule against the runs: what was not measured, or not wholly, does not pass.

    Raises:
        BadInputError: a rule's eval has two runs or two baselines.
    """
    return [_check(rule, _only(rule, runs), _only(rule, baselines)) for rule in rules]


def _only(rule: Rule, runs: Sequence[Run]) -> Run | None:
    """The run of a rule's eval; files of evals that no rule asks for may be given in any number."""
    found = [run for run in runs if run.manifest.eval == rule.eval]
    if len(found) > 1:
        names = " and ".join(str(run.path) for run in found[:2])
        raise BadInputError(f"{names} are both of the eval {rule.eval}, which a gate asks for; give one of them")
    return found[0] if found else None


def _check(rule: Rule, run: Run | None, baseline: Run | None) -> Verdict:
    def verdict(outcome: str, found: str) -> Verdict:
        return Verdict(str(rule), outcome, found, rule.why)

    absent = "skipped" if rule.optional else "failed"
    if run is None:
        return verdict(absent, f"no result file of {rule.eval} was given")
    unsupported = run.with_status("unsupported")
    if run.items and len(unsupported) == len(run.items):
        return verdict(absent, f"unsupported: {unsupported[0].why}")
    if run.missing:
        return verdict("failed", f"{run.path} is not whole: {run.missing_words}")
    if unsupported and not rule.allow_unsupported:
        return verdict("failed", f"{len(unsupported)} of {len(run.items)} items unsupported: {unsupported[0].why}")
    aside = f" ({len(unsupported)} of {len(run.items)} items unsupported)" if unsupported else ""
    try:
        passed, found = _not_worse(run, baseline) if rule.not_worse_than_baseline else _within(rule, summarize(run))
    except BadInputError as error:
        return verdict("failed", str(error))
    return verdict("passed" if passed else "failed", found + aside)


def _not_worse(run: Run, baseline: Run | None) -> tuple[bool, str]:
    if baseline is None:
        return False, f"no --baseline of {run.manifest.eval} was given"
    if baseline.missing:
        return False, f"{baseline.path} is not whole: {baseline.missing_words}"
    result = compare_runs(baseline, run)
    aside = f", {result.unpaired} items in one of them only" if result.unpaired else ""
    return not result.worse, f"{result.verdict}, {result.difference:+.4g}, p = {result.p_value:.3g}{aside}"


def _within(rule: Rule, summary: dict[str, Any]) -> tuple[bool, str]:
    name = next(name for name in _BOUNDS if getattr(rule, name) is not None)
    try:
        value = find_figure(summary, rule.figure or "")
    except KeyError as error:
        return False, f"the summary has no figure {rule.figure}: no {error} there"
    if value is None or (name != "equals" and not _is_number(value)):
        return False, f"{rule.figure} is {value!r}, no number"
    return bool(_BOUNDS[name][1](value, getattr(rule, name))), f"{value}"


def find_figure(summary: dict[str, Any], dotted: str) -> Any:
    """The value under a dotted name; parts that are numbers index lists.

    Raises:
        KeyError: with the part that is not there.
    """
    value: Any = summary
    for part in dotted.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise KeyError(part)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
