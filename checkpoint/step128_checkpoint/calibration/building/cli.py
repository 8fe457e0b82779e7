"""`step128-checkpoint samples OUT`: builds a sample set, or shows one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from step128_checkpoint.calibration.building.mixture import (
    DEFAULT_MIXTURE,
    DEFAULT_SAMPLES,
    DEFAULT_TOKENS_PER_SAMPLE,
    MIN_TOKENS_PER_SAMPLE,
    Mixture,
    load_mixture,
)
from step128_checkpoint.calibration.samples import SampleSet, open_samples
from step128_checkpoint.commands.options import non_negative
from step128_checkpoint.errors import ConfigurationError

_EPILOG = """A sample set is what `calibrate` runs the model on. The mixture matters more than the criterion by which
experts are pruned: calibrate on what you will serve. Mixtures are in configs/calibration; offline.yaml needs no
download, hub.yaml streams public datasets, and your own file can name folders (folder:PATH).

exit codes: 0 done, 65 bad data, 66 a folder or the tokenizer is missing, 73 OUT exists or cannot be written,
78 bad mixture, or it does not fit the checkpoint, or a package is missing, 130 interrupted (nothing is left behind)"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Register the command `samples` with argparse's subparsers object; sets `run` as its function."""
    text = "build the set of samples that `calibrate` measures the model on, or show one"
    parser: argparse.ArgumentParser = commands.add_parser(
        "samples", help=text, description=text, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder to make; with --show, a sample set")
    parser.add_argument("--show", action="store_true", help="show the sample set in OUT instead of making it")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="checkpoint folder: tokenizer, chat template, config (required)"
    )
    parser.add_argument(
        "--mixture", default=DEFAULT_MIXTURE, metavar="FILE", help="mixture: a file, or a name (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=_at_least(1), default=DEFAULT_SAMPLES, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--tokens",
        type=_at_least(MIN_TOKENS_PER_SAMPLE),
        default=DEFAULT_TOKENS_PER_SAMPLE,
        metavar="N",
        help="longest sample (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=non_negative, default=0, metavar="N", help="of every choice (default: %(default)s)"
    )
    parser.add_argument("--no-images", action="store_true", help="leave the mixture's parts with pictures out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    return count


def run(arguments: argparse.Namespace) -> int:
    """Build or open the sample set and print what is in it; returns the exit code."""
    samples = open_samples(arguments.folder) if arguments.show else _build(arguments)
    if arguments.json:
        print(json.dumps(_document(samples)))
        return 0
    _print(samples)
    for warning in shortfalls(samples):
        print(f"step128-checkpoint: warning: {warning}", file=sys.stderr)
    return 0


def shortfalls(samples: SampleSet) -> list[str]:
    """Say which parts gave fewer samples than the mixture asked for."""
    return [
        f"part {part.name!r} gave {part.samples} of {part.wanted} samples: {part.source} holds no more; "
        "other parts made up for it as far as they could"
        for part in samples.mixture
        if part.samples < part.wanted
    ]


def _build(arguments: argparse.Namespace) -> SampleSet:
    if arguments.tokenizer is None:
        raise ConfigurationError("--tokenizer DIR is needed: the folder of the checkpoint that will be calibrated")
    mixture = load_mixture(arguments.mixture)
    if arguments.no_images:
        mixture = mixture.without_images()
    return build_with_progress(
        mixture, arguments.tokenizer, arguments.folder, arguments.samples, arguments.tokens, arguments.seed
    )


def build_with_progress(
    mixture: Mixture, tokenizer_folder: Path, out: Path, samples: int, tokens_per_sample: int, seed: int
) -> SampleSet:
    """:func:`build_samples` with a progress bar on a terminal's stderr; a missing package becomes a sentence.

    Raises:
        ConfigurationError: also if a package is missing.
        CheckpointError: and its kinds, from building.
    """
    try:
        from step128_checkpoint.calibration.building.build import build_samples
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"building samples needs the package {error.name}. Install it: pip install 'step128[checkpoint]'"
        ) from error
    with _progress(samples) as on_sample:
        return build_samples(mixture, tokenizer_folder, out, samples, tokens_per_sample, seed, on_sample)


@contextmanager
def _progress(samples: int) -> Iterator[Callable[[], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=samples)
        yield lambda: progress.advance(task)


def _document(samples: SampleSet) -> dict[str, Any]:
    return {
        "folder": str(samples.folder),
        "sha256": samples.sha256,
        "seed": samples.seed,
        "samples": len(samples),
        "tokens": samples.total_tokens,
        "held_out": int(samples.held_out.sum()),
        "mixture": [
            asdict(part) | {"share_of_tokens": round(part.tokens / samples.total_tokens, 4)} for part in samples.mixture
        ],
        "shortfalls": shortfalls(samples),
    }


def _print(samples: SampleSet) -> None:
    table = Table(title=f"{samples.folder}: {len(samples)} samples, seed {samples.seed}")
    table.add_column("part", no_wrap=True)
    for name in ("samples", "held out", "tokens", "share", "pictures"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in samples.mixture:
        share = f"{100 * part.tokens / samples.total_tokens:.1f} %"
        numbers = (f"{part.samples:,}", f"{part.held_out:,}", f"{part.tokens:,}", share, f"{part.images:,}")
        table.add_row(part.name, *numbers)
    table.add_section()
    pictures = sum(part.images for part in samples.mixture)
    held_out = int(samples.held_out.sum())
    table.add_row("all", f"{len(samples):,}", f"{held_out:,}", f"{samples.total_tokens:,}", "100.0 %", f"{pictures:,}")
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"sha256 {samples.sha256}")
