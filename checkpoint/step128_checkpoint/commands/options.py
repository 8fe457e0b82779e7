"""Options that several commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from step128_checkpoint.conversion import DEFAULT_MAX_SHARD_BYTES
from step128_checkpoint.kv_scaling import K_HEADROOM, V_HEADROOM
from step128_checkpoint.memory import DEFAULT_MAX_MEMORY_BYTES, memory_size

EXIT_CODES = """exit codes:
  0 done, now or before    1 internal error    2 wrong usage    5 permission denied
  65 bad checkpoint or data (`inspect`, `verify`: there are problems)
  66 input not found    69 the hub cannot be reached
  73 output cannot be written (exists, overlaps the input, disk full)
  78 unknown policy, bad policy file, impossible option or missing package
  130 interrupted by Ctrl-C (quantize, dequantize, prune, calibrate and download
      go on when the same command is run again)"""

Run = Callable[[argparse.Namespace], int]


def usable_cores() -> int:
    """The cores that this process may run on: in a container, often not all of the machine's."""
    return len(os.sched_getaffinity(0))


def add_command(commands: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """A command's parser with its help, and the exit codes below it."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def add_conversion(commands: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """A command that makes one checkpoint folder from another, with the options that all of them have."""
    parser = add_command(commands, name, run, text)
    parser.add_argument("input", type=Path, metavar="IN", help="checkpoint folder")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make")
    group = parser.add_argument_group("writing")
    group.add_argument(
        "--max-shard-bytes",
        type=positive,
        default=DEFAULT_MAX_SHARD_BYTES,
        metavar="N",
        help="most bytes of one file (default: %(default)s)",
    )
    group.add_argument(
        "--jobs", type=positive, default=usable_cores(), metavar="N", help="threads (default: all cores)"
    )
    group.add_argument(
        "--max-memory",
        type=memory_size,
        default=DEFAULT_MAX_MEMORY_BYTES,
        metavar="SIZE",
        help="most memory of this process, whatever the checkpoint's size (default: 8GiB); a calibration made on the "
        "way needs what `calibrate --dry-run` says, in a process of its own",
    )
    group.add_argument("--dry-run", action="store_true", help="print what would be done, and the sizes")
    group.add_argument("--restart", action="store_true", help="start over instead of continuing an interrupted run")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def add_kv_scales(parser: argparse.ArgumentParser) -> None:
    """Where the product's KV-cache scales come from."""
    group = parser.add_argument_group("FP8 KV-cache scales")
    group.add_argument(
        "--kv-scales",
        choices=["auto", "keep", "calibrated", "none"],
        default="auto",
        help="auto (default): `prune` takes those of a calibration that pruned; `quantize` the input's, if it has any",
    )
    for kind, default in (("k", K_HEADROOM), ("v", V_HEADROOM)):
        group.add_argument(
            f"--{kind}-headroom",
            type=_headroom,
            metavar="H",
            help=f"of calibrated ones: largest {kind.upper()} stored, over the largest seen (default: {default})",
        )


def _headroom(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 16:
        raise argparse.ArgumentTypeError("must be from 1 to 16")
    return value


def non_negative(text: str) -> int:
    """A count or seed of at least 0, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def positive(text: str) -> int:
    """A count of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
