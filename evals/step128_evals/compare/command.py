"""``compare BEFORE AFTER``: did a change make the server better or worse, or is it chance."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from step128_evals.compare.pairs import Comparison, compare_runs
from step128_evals.options import Parsers, Result, add_command
from step128_evals.runs import read_run
from step128_evals.stats import Interval


def add_parser(commands: Parsers) -> None:
    """Register the command."""
    parser = add_command(
        commands, "compare", "two result files of one eval, item by item: McNemar's test, or Wilcoxon's", _compare
    )
    parser.add_argument("before", type=Path, metavar="BEFORE.jsonl")
    parser.add_argument("after", type=Path, metavar="AFTER.jsonl")


def _compare(parsed: argparse.Namespace) -> Result:
    result = compare_runs(read_run(parsed.before), read_run(parsed.after))
    if not parsed.json:
        print(describe(result))
    return asdict(result), 0


def describe(result: Comparison) -> str:
    """The comparison in words."""
    lines = [f"{result.eval}: {result.after} against {result.before}, {result.pairs} items in both"]
    if result.unpaired:
        lines.append(f"{result.unpaired} items are in one of them only, and left out")
    lines.append(
        f"mean {result.before_mean:.5g} -> {result.after_mean:.5g}, difference {result.difference:+.5g}"
        + _interval(result.difference_interval, "+.5g")
    )
    if result.ratio is not None:
        lines.append(f"ratio (geometric mean) {result.ratio:.4f}" + _interval(result.ratio_interval, ".4f"))
    changed = "" if result.gained is None else f"{result.gained} gained, {result.lost} lost; "
    lines.append(f"{changed}{result.test}: p = {result.p_value:.4f}")
    lines.append(f"verdict: {result.verdict}")
    return "\n".join(lines)


def _interval(interval: Interval | None, form: str) -> str:
    return f" (95 %: {interval.low:{form}} to {interval.high:{form}})" if interval else ""
