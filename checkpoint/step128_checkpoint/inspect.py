"""Says what a checkpoint folder holds: parameters, bytes and bits per weight by component, KV scales, problems."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from step128_checkpoint.dequantize import check_nl4, scale_of
from step128_checkpoint.dtypes import FLOAT_DTYPES, to_float32
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.policy import Policy
from step128_checkpoint.quantize import PACKED_SUFFIX, SCALE_SUFFIX, expected_components
from step128_checkpoint.reader import Checkpoint, TensorInfo

_KV_SCALE = re.compile(
    r"model\.layers\.(\d+)\.self_attn\.(k)_proj\.k_scale|model\.layers\.(\d+)\.self_attn\.(v)_proj\.v_scale"
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class ComponentSize:
    """One row of the table. ``parameters`` counts weights, not stored elements: a packed byte is two."""

    component: str
    tensors: int
    parameters: int
    size_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each parameter, scales included."""
        return 8 * self.size_bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class KvScales:
    """Range of the FP8 KV-cache scales: ``layers`` have both a K and a V scale."""

    layers: int
    k_min: float
    k_max: float
    v_min: float
    v_max: float


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_checkpoint` found. No ``problems`` does not mean that all data was read: it was not."""

    folder: Path
    architecture: str
    policy: str | None
    shards: int
    components: tuple[ComponentSize, ...]
    kv_scales: KvScales | None
    problems: tuple[str, ...]

    @property
    def total(self) -> ComponentSize:
        """All components together."""
        rows = self.components
        return ComponentSize(
            "total",
            sum(row.tensors for row in rows),
            sum(row.parameters for row in rows),
            sum(row.size_bytes for row in rows),
        )


def inspect_checkpoint(checkpoint: Checkpoint, policy: Policy) -> Inspection:
    """Count and check a checkpoint from its headers and its KV scales (the only data that is read).

    Args:
        checkpoint: open for reading (its files are opened and closed here).
        policy: any policy of the policy file; only its component patterns are used.
    """
    problems: list[str] = []
    entry = _quantization(checkpoint, problems)
    rows = component_sizes(checkpoint, policy)
    names = {row.component for row in rows}
    problems += [f"no tensor of component {name}" for name in expected_components(checkpoint) if name not in names]
    with checkpoint:
        scales = _kv_scales(checkpoint, problems)
    return Inspection(
        folder=checkpoint.folder,
        architecture=str(next(iter(checkpoint.config.get("architectures") or ["unknown"]))),
        policy=str(entry["policy"]) if entry and "policy" in entry else None,
        shards=len(checkpoint.shard_paths),
        components=rows,
        kv_scales=scales,
        problems=tuple(problems),
    )


def component_sizes(checkpoint: Checkpoint, policy: Policy) -> tuple[ComponentSize, ...]:
    """Sizes by component, the policy file's components first, in its order."""
    sizes: dict[str, list[int]] = {name: [0, 0, 0] for name in policy.patterns}
    for tensor in checkpoint.tensors.values():
        weight_name = _weight_name(tensor.name)
        layers = checkpoint.num_hidden_layers
        component = policy.component_of(weight_name, layers) or other_component(weight_name, layers)
        row = sizes.setdefault(component, [0, 0, 0])
        row[0] += 1
        row[1] += _parameters(tensor)
        row[2] += tensor.size_bytes
    return tuple(ComponentSize(name, *row) for name, row in sizes.items() if row[0])


def other_component(tensor_name: str, num_hidden_layers: int) -> str:
    """Name the group of a tensor that no policy ever quantizes."""
    if _KV_SCALE.fullmatch(tensor_name):
        return "kv_scales"
    if tensor_name.startswith("vision_model."):
        return "vision_other"
    layer = _LAYER.match(tensor_name)
    if layer and int(layer[1]) >= num_hidden_layers:
        return "mtp_other"
    return "router" if ".moe." in tensor_name else "trunk_other"


def _weight_name(name: str) -> str:
    for suffix in (PACKED_SUFFIX, SCALE_SUFFIX):
        if name.endswith(f"weight{suffix}"):
            return name.removesuffix(suffix)
    return name


def _parameters(tensor: TensorInfo) -> int:
    if tensor.name.endswith(f"weight{PACKED_SUFFIX}"):
        return tensor.elements * 2
    if tensor.name.endswith((f"weight{SCALE_SUFFIX}", ".k_scale", ".v_scale")):
        return 0
    return tensor.elements


def _quantization(checkpoint: Checkpoint, problems: list[str]) -> dict[str, Any] | None:
    """The quantization_config, if the checkpoint has one; checks that every packed weight has its scale."""
    packed = [tensor for tensor in checkpoint.tensors.values() if tensor.name.endswith(f"weight{PACKED_SUFFIX}")]
    if not packed and "quantization_config" not in checkpoint.config:
        return None
    entry: dict[str, Any] | None = None
    try:
        entry = check_nl4(checkpoint)
    except CheckpointError as error:
        problems.append(str(error))
    if not packed:
        problems.append("config.json has a quantization_config, but no tensor is packed")
    for tensor in packed:
        try:
            scale_of(checkpoint, tensor)
        except CheckpointError as error:
            problems.append(str(error))
    for tensor in checkpoint.tensors.values():
        if tensor.name.endswith(f"weight{SCALE_SUFFIX}") and _weight_name(tensor.name) + PACKED_SUFFIX not in (
            checkpoint.tensors
        ):
            problems.append(f"{tensor.path}: tensor {tensor.name} has no packed weight beside it")
    return entry


def _kv_scales(checkpoint: Checkpoint, problems: list[str]) -> KvScales | None:
    found: dict[str, dict[int, float]] = {"k": {}, "v": {}}
    for tensor in checkpoint.tensors.values():
        if not (match := _KV_SCALE.fullmatch(tensor.name)):
            continue
        if tensor.elements != 1 or tensor.dtype not in FLOAT_DTYPES:
            problems.append(
                f"{tensor.path}: tensor {tensor.name} is {tensor.dtype} {list(tensor.shape)}, one float needed"
            )
            continue
        value = float(to_float32(checkpoint.read(tensor.name), tensor.dtype, (1,))[0])
        if not (np.isfinite(value) and value > 0):
            problems.append(f"{tensor.path}: tensor {tensor.name} is {value}; a positive scale is needed")
        found[match[2] or match[4]][int(match[1] or match[3])] = value
    k, v = found["k"], found["v"]
    if not k and not v:
        return None
    missing = sorted((set(range(checkpoint.num_hidden_layers)) | set(k) | set(v)) - (set(k) & set(v)))
    if missing:
        problems.append(f"KV scales are incomplete: layer {missing[0]} and {len(missing) - 1} more lack one")
    if not k or not v:
        return None
    return KvScales(len(set(k) & set(v)), min(k.values()), max(k.values()), min(v.values()), max(v.values()))
