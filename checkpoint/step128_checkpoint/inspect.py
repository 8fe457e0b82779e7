"""Says what a checkpoint folder holds: sizes by component, experts, KV scales, how it was made, problems."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step128_checkpoint.dequantize import check_nl4, scale_of
from step128_checkpoint.details import Details, read_details
from step128_checkpoint.dimensions import layer_of
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.expected import structure_problems
from step128_checkpoint.header import TensorInfo
from step128_checkpoint.kv_bounds import k_scale_problems
from step128_checkpoint.kv_scales import KV_SCALE, KvScales, read_kv_scales
from step128_checkpoint.policy import PACKED_SUFFIX, SCALE_SUFFIX, Policy
from step128_checkpoint.reader import Checkpoint


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
class Inspection:
    """What :func:`inspect_checkpoint` found. No ``problems`` does not mean that all data was read: it was not."""

    folder: Path
    architecture: str
    policy: str | None
    shards: int
    components: tuple[ComponentSize, ...]
    details: Details | None
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
    """Count and check a checkpoint from its headers, KV scales and K norms (the only data that is read).

    Args:
        checkpoint: open for reading (its files are opened and closed here).
        policy: any policy of the policy file; only its component patterns are used.
    """
    problems: list[str] = []
    entry = _quantization(checkpoint, problems)
    rows = component_sizes(checkpoint, policy)
    problems += structure_problems(checkpoint)
    details = read_details(checkpoint, problems)
    with checkpoint:
        scales = read_kv_scales(checkpoint, problems)
        problems += k_scale_problems(checkpoint)
    architectures = checkpoint.config.get("architectures")
    return Inspection(
        folder=checkpoint.folder,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown",
        policy=str(entry["policy"]) if entry and "policy" in entry else None,
        shards=len(checkpoint.shard_paths),
        components=rows,
        details=details,
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
    if KV_SCALE.fullmatch(tensor_name):
        return "kv_scales"
    if tensor_name.startswith("vision_model."):
        return "vision_other"
    layer = layer_of(tensor_name)
    if layer is not None and layer >= num_hidden_layers:
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
