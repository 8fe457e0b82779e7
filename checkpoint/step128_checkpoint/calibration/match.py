"""Whether a calibration belongs to a checkpoint: it was made of it, or on the way pruned to what the checkpoint is."""

from __future__ import annotations

from typing import Any

from step128_checkpoint.calibration.result import Calibration
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.files import read_json_object
from step128_checkpoint.manifest import headers_sha256
from step128_checkpoint.reader import Checkpoint

PRUNING_NAME = "step128_pruning.json"
"""In a pruned checkpoint: which of the original experts it has, and what decided that."""


def pruning_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What `prune` left in the checkpoint's folder, or None."""
    path = checkpoint.folder / PRUNING_NAME
    return read_json_object(path) if path.exists() else None


def check_match(checkpoint: Checkpoint, calibration: Calibration) -> None:
    """Refuse a calibration of another checkpoint.

    Raises:
        CheckpointError: it is one. Says of what it is.
    """
    kept, name = calibration.kept_experts, calibration.document["checkpoint"]["name"]
    if kept is None:
        if calibration.document["checkpoint"]["headers_sha256"] != headers_sha256(checkpoint):
            raise CheckpointError(
                f"{calibration.folder}: made of the checkpoint {name!r}, whose config or tensors differ from "
                f"{checkpoint.folder}. Run `calibrate` on this one."
            )
        return
    pruning = pruning_of(checkpoint) or {}
    found = {int(layer): tuple(experts) for layer, experts in pruning.get("kept_experts", {}).items()}
    if found == kept and pruning.get("headers_sha256") != calibration.document["checkpoint"]["headers_sha256"]:
        raise CheckpointError(
            f"{calibration.folder}: made of {name!r} while pruning it, and {checkpoint.folder} was pruned from another "
            "checkpoint, whose config or tensors differ. Calibrate and prune that one, or prune this one's."
        )
    if found != kept:
        raise CheckpointError(
            f"{calibration.folder}: made of {name!r} while pruning it, and {checkpoint.folder} does not have the "
            f"experts that it kept. Prune first: step128-checkpoint prune {name} OUT --calibration {calibration.folder}"
        )
