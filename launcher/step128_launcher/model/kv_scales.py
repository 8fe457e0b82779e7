"""The calibrated KV-cache scales in a checkpoint: which layers have them, and their values."""

import math
from pathlib import Path

from step128_launcher.errors import CheckpointError
from step128_launcher.model.footprint import KvScale
from step128_launcher.model.shards import StoredTensor, read_float32_scalar
from step128_launcher.model.tensors import kv_scale_names


def read_kv_scales(
    folder: Path, trunk_layers: int, mtp_layers: int, stored: dict[str, StoredTensor]
) -> dict[int, KvScale] | None:
    """Return layer -> scales, or None if the checkpoint has none; the published one has none for its MTP layers.

    Raises:
        CheckpointError: if only some layers of the trunk or of the MTP layers have them, or a value cannot be one.

    """
    trunk = _all_or_none(folder, "trunk", range(trunk_layers), stored)
    draft = _all_or_none(folder, "MTP", range(trunk_layers, trunk_layers + mtp_layers), stored)
    if draft and not trunk:
        raise CheckpointError(
            f"{folder}: KV-cache scales are there for the MTP layers, but none for the trunk's.",
            "Calibrate again: the trunk would be served with wrong values.",
        )
    return trunk | draft or None


def _all_or_none(folder: Path, part: str, layers: range, stored: dict[str, StoredTensor]) -> dict[int, KvScale]:
    """Return the scales of `layers`; empty if there are none."""
    names = [(layer, *kv_scale_names(layer)) for layer in layers]
    missing = [name for _, *pair in names for name in pair if name not in stored]
    if len(missing) == 2 * len(names):
        return {}
    if missing:
        raise CheckpointError(
            f"{folder}: KV-cache scales are there for some {part} layers, but {missing[0]} is missing "
            f"({len(missing)} of {2 * len(names)}).",
            "Calibrate again: a layer without scales would be served with wrong values.",
        )
    return {layer: KvScale(_scale(stored[k]), _scale(stored[v])) for layer, k, v in names}


def _scale(tensor: StoredTensor) -> float:
    if tensor.dtype != "F32" or tensor.shape != (1,):
        raise CheckpointError(
            f"{tensor.file}: KV-cache scale {tensor.name} is {tensor.dtype} {list(tensor.shape)}; it must be F32 [1]."
        )
    value = read_float32_scalar(tensor)
    if not (math.isfinite(value) and value > 0):
        raise CheckpointError(f"{tensor.file}: KV-cache scale {tensor.name} is {value}; it must be positive.")
    return value
