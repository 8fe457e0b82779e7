"""``step128-checkpoint inspect``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from step128_checkpoint.commands.options import add_command
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.inspect import inspect_checkpoint
from step128_checkpoint.policy import load_policy
from step128_checkpoint.reader import open_checkpoint
from step128_checkpoint.tables import print_inspection


def add_parser(commands: Any) -> None:
    """Register the command with argparse's subparsers object."""
    parser = add_command(commands, "inspect", _run, "say what a checkpoint holds, by component")
    parser.add_argument("input", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    found = inspect_checkpoint(open_checkpoint(arguments.input), load_policy())
    if arguments.json:
        rows = [asdict(row) | {"bits_per_weight": row.bits_per_weight} for row in (*found.components, found.total)]
        print(json.dumps(asdict(found) | {"folder": str(found.folder), "components": rows}))
    else:
        print_inspection(found)
    return CheckpointError.exit_code if found.problems else 0
