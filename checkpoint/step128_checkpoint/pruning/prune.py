"""Drops experts from a checkpoint's tensors, without loading the model: what stays keeps its bytes.

Of every MoE layer, the packed experts, the router's rows and its bias are sliced along their first dimension; experts
are renumbered in their old order. Nothing else changes but ``moe_num_experts``: transformers would lose the MTP layers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from step128_checkpoint.calibration.match import PRUNING_NAME, pruning_of
from step128_checkpoint.conversion import DEFAULT_MAX_SHARD_BYTES, Conversion, copy_step
from step128_checkpoint.dimensions import Dimensions, read_dimensions
from step128_checkpoint.dtypes import all_finite
from step128_checkpoint.errors import CheckpointError, ConfigurationError
from step128_checkpoint.header import TensorInfo
from step128_checkpoint.kv_scales import KV_SCALE
from step128_checkpoint.kv_scaling import KEEP_KV_SCALES, KvScalePlan
from step128_checkpoint.layout import OutputTensor
from step128_checkpoint.manifest import headers_sha256
from step128_checkpoint.plain import require_plain
from step128_checkpoint.pruning.decide import Pruning, experts_per_token
from step128_checkpoint.reader import Checkpoint
from step128_checkpoint.shards import PIECE_BYTES, Step

FORMAT, FORMAT_VERSION = "step128-pruning", 1

_BY_EXPERT = re.compile(
    r"model\.layers\.([0-9]{1,9})\.moe\.(?:(?:gate_proj|up_proj|down_proj|gate)\.weight|router_bias)"
)


def plan_pruning(
    checkpoint: Checkpoint,
    pruning: Pruning,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    kv_plan: KvScalePlan = KEEP_KV_SCALES,
) -> Conversion:
    """Decide, from headers alone, what becomes of every tensor.

    Args:
        checkpoint: bf16, fp16 or fp32.
        pruning: which experts stay.
        max_shard_bytes: most bytes of one file.
        kv_plan: whether the input's KV scales are carried, replaced, or left out.

    Raises:
        CheckpointError: the input is quantized, or contradicts its config.json.
        ConfigurationError: ``pruning.kept`` does not fit the model: a layer is missing or unknown, layers keep
            different counts (vLLM has one for all), fewer than each token needs, or experts that do not exist.
    """
    require_plain(checkpoint)
    dimensions = read_dimensions(checkpoint)
    _check_kept(pruning, dimensions, experts_per_token(checkpoint))
    steps = []
    for tensor in checkpoint.tensors.values():
        if kv_plan.source != "input" and KV_SCALE.fullmatch(tensor.name):
            continue
        match = _BY_EXPERT.fullmatch(tensor.name)
        kept = pruning.kept[int(match[1])] if match else None
        steps.append(copy_step(checkpoint, tensor) if kept is None else slice_step(checkpoint, tensor, kept))
    config = copy.deepcopy(checkpoint.config)
    config["text_config"]["moe_num_experts"] = pruning.keep
    record = json.dumps(_record(checkpoint, pruning, dimensions.num_experts), indent=1).encode() + b"\n"
    options = {
        "command": "prune",
        "keep": pruning.keep,
        "criterion": pruning.criterion,
        "seed": pruning.seed,
        "calibration": pruning.calibration["sha256"] if pruning.calibration else None,
        "record": hashlib.sha256(record).hexdigest(),
        **kv_plan.options(),
    }
    steps += kv_plan.steps()
    return Conversion(checkpoint, steps, config, options, max_shard_bytes, extra_files={PRUNING_NAME: record})


def slice_step(checkpoint: Checkpoint, tensor: TensorInfo, kept: Sequence[int]) -> Step:
    """A step that carries the rows ``kept`` of a tensor's first dimension, in that order, unchanged.

    Rows are read one by one; a piece is part of one row, or several whole rows if they are small.
    """
    row_bytes = tensor.size_bytes // tensor.shape[0]
    rows_per_piece = max(1, PIECE_BYTES // row_bytes)
    pieces_per_row = -(-row_bytes // PIECE_BYTES)
    part_bytes = min(row_bytes, PIECE_BYTES)

    def produce(number: int) -> tuple[bytes]:
        group, part = divmod(number, pieces_per_row)
        start = part * PIECE_BYTES
        size = min(part_bytes, row_bytes - start)
        rows = kept[group * rows_per_piece : (group + 1) * rows_per_piece]
        data = b"".join(checkpoint.read(tensor.name, row * row_bytes + start, size) for row in rows)
        if not all_finite(data, tensor.dtype):
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name}, experts {rows[0]} to {rows[-1]}: holds NaN or infinity. "
                "Download the file again."
            )
        return (data,)

    output = OutputTensor(tensor.name, tensor.dtype, (len(kept), *tensor.shape[1:]), tensor.path.name)
    return Step((output,), -(-len(kept) // rows_per_piece) * pieces_per_row, produce)


def _record(checkpoint: Checkpoint, pruning: Pruning, experts: int) -> dict[str, Any]:
    """The record; expert numbers are those of the input, whose own record (pruned before) is kept as ``previous``."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "keep": pruning.keep,
        "of": experts,
        "criterion": pruning.criterion,
        "seed": pruning.seed,
        "headers_sha256": headers_sha256(checkpoint),
        "calibration": pruning.calibration,
        "super_experts": sorted(map(list, pruning.super_experts)),
        "protected": sorted(map(list, pruning.protected)),
        "kept_experts": {str(layer): list(kept) for layer, kept in sorted(pruning.kept.items())},
        "previous": pruning_of(checkpoint),
    }


def _check_kept(pruning: Pruning, dimensions: Dimensions, needed: int) -> None:
    if not dimensions.moe_layers:
        raise ConfigurationError("the model has no experts: there is nothing to prune")
    if missing := sorted(dimensions.moe_layers - set(pruning.kept)):
        raise ConfigurationError(f"it is not said which experts layer {missing[0]} keeps")
    if unknown := sorted(set(pruning.kept) - dimensions.moe_layers):
        raise ConfigurationError(f"layer {unknown[0]} has no experts to prune")
    for layer, kept in pruning.kept.items():
        if list(kept) != sorted(set(kept)) or not set(kept) <= set(range(dimensions.num_experts)):
            raise ConfigurationError(
                f"layer {layer}: the experts to keep must be ascending numbers below {dimensions.num_experts}"
            )
        if len(kept) != pruning.keep:
            raise ConfigurationError(
                f"layer {layer} would keep {len(kept)} experts and another {pruning.keep}; all must keep as many"
            )
    if pruning.keep < needed:
        raise ConfigurationError(f"{pruning.keep} experts are too few: each token is routed to {needed}")
