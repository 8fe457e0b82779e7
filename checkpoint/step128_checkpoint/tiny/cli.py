"""`step128-checkpoint tiny OUT`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .make import OutputExistsError, TinyResult, default_cache_dir, make_tiny

EXIT_INPUT_NOT_FOUND = 66
EXIT_CANNOT_WRITE = 73
EXIT_INTERRUPTED = 130


def _step_count(text: str) -> int:
    steps = int(text)
    if steps < 1:
        raise argparse.ArgumentTypeError("at least 1 step is needed")
    return steps


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register the command `tiny` with argparse's subparsers object; sets `run` as its function."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tiny",
        description="Train a small checkpoint of architecture Step3p7ForConditionalGeneration (minutes on two cores; "
        "seconds the second time) on Python's own standard library and generated dialogues: mixture of experts, "
        "sliding attention, MTP heads, tools. The vision tower is untrained (plumbing only).",
        epilog="Exit codes: 0 ok, 66 Python's library sources not found, 73 OUT exists, or OUT or the cache cannot be "
        "written, 130 interrupted.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--steps", type=_step_count, help="training steps (default: the full recipe); few: structure only"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, dialogues and batches (default: 0)")
    parser.add_argument(
        "--cache-dir", type=Path, help=f"where finished models are kept (default: {default_cache_dir()})"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if this command made it")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Make the checkpoint and print what it is worth; returns the exit code."""
    try:
        result = make_tiny(
            args.out,
            steps=args.steps,
            seed=args.seed,
            cache_dir=args.cache_dir,
            progress=not args.json,
            force=args.force,
        )
    except OutputExistsError as error:
        return _fail(str(error), EXIT_CANNOT_WRITE)
    except FileNotFoundError as error:
        return _fail(str(error), EXIT_INPUT_NOT_FOUND)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", EXIT_INTERRUPTED)
    except OSError as error:
        return _fail(f"cannot write {error.filename or args.out}: {error.strerror or error}", EXIT_CANNOT_WRITE)
    if args.json:
        print(json.dumps(asdict(result)))
    else:
        _show(result)
    return 0


def _fail(text: str, code: int) -> int:
    print(f"step128-checkpoint tiny: {text}", file=sys.stderr)
    return code


def _show(result: TinyResult) -> None:
    table = Table(show_header=False, box=None)
    acceptance = " / ".join(f"{100 * share:.0f} %" for share in result.mtp_acceptance)
    rows = {
        "parameters": f"{result.parameters:,} (vision tower untrained: plumbing only)",
        "trained on": f"{result.training_tokens:,} tokens in {result.steps} steps",
        "held-out perplexity": f"{result.held_out_perplexity:.2f} (by frequency: {result.unigram_perplexity:.0f})",
        "drafts accepted": f"{acceptance} at positions 1 / 2 / 3 (greedy, held-out text)",
        "time": f"{result.seconds:.1f} s{' (from the cache)' if result.cached else ''}",
        "checkpoint": result.path,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(soft_wrap=True).print(table)
