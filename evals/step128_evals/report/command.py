"""``report RESULT... --out DIR``: Markdown with pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from step128_evals.options import Parsers, Result, add_command
from step128_evals.report.document import write_report
from step128_evals.runs import read_run


def add_parser(commands: Parsers) -> None:
    """Register the command."""
    parser = add_command(commands, "report", "result files as one Markdown document with pictures", _report)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.jsonl")
    parser.add_argument("--out", type=Path, default=Path("results/report"), metavar="DIR", help="default: %(default)s")


def _report(parsed: argparse.Namespace) -> Result:
    document = write_report([read_run(path) for path in parsed.results], parsed.out)
    if not parsed.json:
        print(document)
    return {"report": str(document)}, 0
