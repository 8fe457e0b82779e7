"""``model-card DIR``: writes README.md for a product from what its own files prove, and says what was not measured."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from pathlib import Path

from step128_checkpoint.card_text import MARKER, Evaluation, card_text
from step128_checkpoint.errors import CheckpointError, OutputError
from step128_checkpoint.files import read_json_object, reading
from step128_checkpoint.inspect import inspect_checkpoint
from step128_checkpoint.policy import load_policy
from step128_checkpoint.reader import open_checkpoint
from step128_checkpoint.shards import disk_error, write_synced

CARD_NAME = "README.md"
_HEAD_BYTES = 8192


def is_generated(path: Path) -> bool:
    """Whether a README.md is one that `model-card` wrote."""
    try:
        with path.open("rb") as stream:
            return MARKER.encode() in stream.read(_HEAD_BYTES)
    except OSError:
        return False


def write_model_card(folder: Path, evaluations: list[Path], base_model: str | None = None, force: bool = False) -> Path:
    """Write the card of a checkpoint, whole or not at all; returns its path.

    Args:
        folder: the product.
        evaluations: result files of `step128-eval ... --json` or `step128-checkpoint perplexity ... --json`.
        base_model: name on the hub; None: as the download noted it, else unknown.
        force: replace a README.md that this command did not write.

    Raises:
        OutputError: there is a README.md of another origin, or the file cannot be written.
        CheckpointError: the checkpoint has problems (a card would hide them), or a result file cannot be read.
    """
    card = folder / CARD_NAME
    found = inspect_checkpoint(open_checkpoint(folder), load_policy())
    if found.problems:
        raise CheckpointError(
            f"{found.problems[0]} (no card is written for a checkpoint with problems; `inspect` shows all "
            f"{len(found.problems)})"
        )
    if card.exists() and not is_generated(card) and not force:
        raise OutputError(f"{card} was not written by `model-card`. Move it away, or add --force to replace it.")
    results = [Evaluation(path.name, _result(path)) for path in evaluations]
    _replace(card, card_text(found, results, base_model).encode())
    return card


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.partial")
    try:
        write_synced(beside, data)
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):  # a read-only file system refuses this too, and never had the file
            beside.unlink(missing_ok=True)
        raise disk_error(path.parent, error) from error


def _result(path: Path) -> dict[str, object]:
    """The last line of a result file that holds a JSON object (progress may stand above it), or the whole file."""
    with reading(path):
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    try:
        value = json.loads(lines[-1]) if lines else None
    except ValueError:
        value = None
    result = value if isinstance(value, dict) else read_json_object(path)
    if {"id", "status", "data"} <= result.keys():
        raise CheckpointError(
            f"{path}: holds the items of an eval; the card takes what `step128-eval show {path.name} --json` prints"
        )
    if "error" in result:
        raise CheckpointError(f"{path}: reports a failure, not a result: {result['error']}")
    return result


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Register the command `model-card`; sets `run` as its function."""
    parser = commands.add_parser(
        "model-card",
        description="Write README.md for a checkpoint from its manifest, its reports and the result files given. "
        "Nothing is claimed that these do not hold.",
        epilog="Exit codes: 0 written, 65 the checkpoint or a result file is bad, 66 not found, 73 README.md is there "
        "and of another origin, or cannot be written.",
    )
    parser.add_argument("input", type=Path, metavar="DIR")
    parser.add_argument(
        "--evals", type=Path, nargs="+", default=[], metavar="RESULT.json", help="results of step128-eval --json"
    )
    parser.add_argument("--base-model", metavar="NAME", help="on the hub (default: as `download` noted it)")
    parser.add_argument("--force", action="store_true", help="replace a README.md of another origin")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Write the card and say where; returns the exit code."""
    card = write_model_card(arguments.input, arguments.evals, arguments.base_model, arguments.force)
    print(json.dumps({"card": str(card)}) if arguments.json else f"{card} written")
    return 0
