"""``step128-checkpoint dequantize``."""

from __future__ import annotations

import argparse
from typing import Any

from step128_checkpoint.commands.converting import finish, run_conversion
from step128_checkpoint.commands.options import add_conversion
from step128_checkpoint.dequantize import plan_dequantization
from step128_checkpoint.policy import load_policy
from step128_checkpoint.reader import open_checkpoint


def add_parser(commands: Any) -> None:
    """Register the command with argparse's subparsers object."""
    parser = add_conversion(commands, "dequantize", _run, "turn an NL4 checkpoint back into plain weights")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="default: %(default)s (exact)"
    )


def _run(arguments: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(arguments.input)
    conversion = plan_dequantization(checkpoint, arguments.dtype, max_shard_bytes=arguments.max_shard_bytes)
    report, _ = run_conversion(arguments, conversion, load_policy())
    return finish(arguments, report)
