"""``gate THRESHOLDS.yaml RESULT...``: the release check; exit code 3 if a threshold is missed."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from step128_evals.errors import ThresholdError
from step128_evals.gate.rules import Verdict, check_rules, read_rules
from step128_evals.options import Parsers, Result, add_command
from step128_evals.runs import read_run


def add_parser(commands: Parsers) -> None:
    """Register the command."""
    parser = add_command(commands, "gate", "hold result files against a YAML of thresholds", _gate)
    parser.add_argument("thresholds", type=Path, metavar="THRESHOLDS.yaml")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.jsonl")
    parser.add_argument(
        "--baseline", type=Path, nargs="+", default=[], metavar="RESULT.jsonl", help="for not_worse_than_baseline"
    )


def _gate(parsed: argparse.Namespace) -> Result:
    rules = read_rules(parsed.thresholds)
    runs, baselines = ([read_run(path) for path in paths] for paths in (parsed.results, parsed.baseline))
    verdicts = check_rules(rules, runs, baselines)
    missed = [verdict for verdict in verdicts if verdict.outcome == "failed"]
    if not parsed.json:
        _print(verdicts)
    report = {"passed": not missed, "gates": [asdict(verdict) for verdict in verdicts]}
    return report, ThresholdError.exit_code if missed else 0


def _print(verdicts: list[Verdict]) -> None:
    table = Table(Column("gate", overflow="fold"), "", Column("found", overflow="fold"), "why")
    colours = {"passed": "green", "failed": "red", "skipped": "yellow"}
    for verdict in verdicts:
        mark = f"[{colours[verdict.outcome]}]{verdict.outcome}[/]"
        table.add_row(escape(verdict.rule), mark, escape(verdict.found), escape(verdict.why))
    Console(soft_wrap=True).print(table)
    failed = sum(verdict.outcome == "failed" for verdict in verdicts)
    print(f"{failed} of {len(verdicts)} gates are missed" if failed else f"all {len(verdicts)} gates passed or skipped")
