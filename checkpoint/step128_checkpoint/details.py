"""What a checkpoint says about itself beyond its tensors: experts, drafts, quantization, pruning, and who made it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from step128_checkpoint.calibration.match import PRUNING_NAME
from step128_checkpoint.dimensions import layer_of, read_dimensions
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.files import read_json_object
from step128_checkpoint.reader import Checkpoint
from step128_checkpoint.recipe import read_recipe

DOWNLOAD_NAME = "step128_download.json"

_Report = TypeVar("_Report")


@dataclass(frozen=True)
class PruningDetails:
    """What was pruned: ``keep`` experts of ``before`` (None: not said) of each MoE layer stay.

    ``super_experts`` are (layer, original expert), ``kept_experts`` original numbers by layer.
    """

    criterion: str
    keep: int
    before: int | None
    calibration: Any
    super_experts: tuple[tuple[int, int], ...]
    kept_experts: dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class Details:
    """Of a Step-3.7 checkpoint. ``mtp_layers`` are those that are there, ``mtp_layers_stated`` those config.json names.

    ``method`` is how NL4 scales and codes were chosen (None: not quantized, or not said). ``commands`` are those that
    made the folder, first one first (None: no manifest). ``file_bytes`` counts the safetensors files, headers included.
    """

    layers: int
    moe_layers: int
    experts: int
    experts_per_token: int | None
    mtp_layers: int
    mtp_layers_stated: int
    method: str | None
    pruning: PruningDetails | None
    commands: tuple[str, ...] | None
    file_bytes: int


def read_details(checkpoint: Checkpoint, problems: list[str]) -> Details | None:
    """Collect the details from config.json, tensor names and the reports in the folder.

    None if config.json describes no Step-3.7 model (which :mod:`expected` reports). What is wrong with a report is
    added to ``problems``.
    """
    try:
        dimensions = read_dimensions(checkpoint)
    except CheckpointError:
        return None
    trunk = dimensions.num_hidden_layers
    drafts = {layer for name in checkpoint.tensors if (layer := layer_of(name)) is not None and layer >= trunk}
    top_k = checkpoint.text_config.get("moe_top_k")
    recipe = _or_problem(lambda: read_recipe(checkpoint.folder), problems)
    return Details(
        layers=trunk,
        moe_layers=len(dimensions.moe_layers),
        experts=dimensions.num_experts,
        experts_per_token=top_k if isinstance(top_k, int) else None,
        mtp_layers=len(drafts),
        mtp_layers_stated=dimensions.num_mtp_layers,
        method=quantization_method(checkpoint),
        pruning=_or_problem(lambda: read_pruning(checkpoint.folder), problems),
        commands=recipe.commands if recipe else None,
        file_bytes=sum(path.stat().st_size for path in checkpoint.shard_paths),
    )


def quantization_method(checkpoint: Checkpoint) -> str | None:
    """How the scales and codes were chosen, by quantization_config; None if it does not say."""
    entry = checkpoint.config.get("quantization_config")
    method = entry.get("method") if isinstance(entry, dict) else None
    return str(method) if method is not None else None


def read_pruning(folder: Path) -> PruningDetails | None:
    """Read the report that `prune` leaves in its product; None if there is none.

    Raises:
        CheckpointError: it cannot be read or is malformed.
    """
    path = folder / PRUNING_NAME
    if not path.exists():
        return None
    report = read_json_object(path)
    try:
        return PruningDetails(
            criterion=str(report["criterion"] or "a given list"),
            keep=int(report["keep"]),
            before=int(report["of"]) if "of" in report else None,
            calibration=report.get("calibration"),
            super_experts=tuple((int(layer), int(expert)) for layer, expert in report["super_experts"]),
            kept_experts={int(layer): tuple(map(int, kept)) for layer, kept in report["kept_experts"].items()},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: malformed: {error!r}") from error


def _or_problem(read: Callable[[], _Report | None], problems: list[str]) -> _Report | None:
    try:
        return read()
    except CheckpointError as error:
        problems.append(str(error))
        return None
