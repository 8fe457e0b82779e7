"""``show RESULT``: the figures of a result file, without an endpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from step128_evals.evaluation import report_run
from step128_evals.options import Parsers, Result, add_command
from step128_evals.runs import read_run


def add_parser(commands: Parsers) -> None:
    """Register the command."""
    parser = add_command(commands, "show", "the figures of a result file, as its eval printed them", _show)
    parser.add_argument("result", type=Path, metavar="RESULT.jsonl")


def _show(parsed: argparse.Namespace) -> Result:
    return report_run(read_run(parsed.result), parsed.json)
