"""Undoes :mod:`quantize`: NL4 weights become float32 (exact) or bfloat16 (rounded to nearest), the rest is carried."""

from __future__ import annotations

import copy
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from step128_checkpoint.conversion import DEFAULT_MAX_SHARD_BYTES, Conversion, copy_step
from step128_checkpoint.dtypes import from_float32, raw_array
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.header import TensorInfo
from step128_checkpoint.layout import OutputTensor
from step128_checkpoint.policy import PACKED_SUFFIX, SCALE_SUFFIX
from step128_checkpoint.reader import Checkpoint
from step128_checkpoint.shards import Step
from step128_kernels import codebook

WeightDtype = Literal["float32", "bfloat16"]
_SAFETENSORS_DTYPES: dict[WeightDtype, str] = {"float32": "F32", "bfloat16": "BF16"}
_PIECE_WEIGHTS = 1 << 20


def plan_dequantization(
    checkpoint: Checkpoint, dtype: WeightDtype = "float32", max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
) -> Conversion:
    """Decide, from headers alone, what becomes of every tensor.

    Tensors that were never quantized keep their bytes and type: widening them would add size and nothing else.
    ``torch_dtype`` in config.json becomes ``dtype``, so that programs compute in it.

    Raises:
        CheckpointError: the checkpoint is not NL4, or a packed tensor and its scale do not belong together.
    """
    check_nl4(checkpoint)
    steps: list[Step] = []
    for tensor in checkpoint.tensors.values():
        if tensor.name.endswith(f"weight{PACKED_SUFFIX}"):
            steps.append(_dequantize_step(checkpoint, tensor, scale_of(checkpoint, tensor), dtype))
        elif tensor.name.endswith(f"weight{SCALE_SUFFIX}"):
            if tensor.name.removesuffix(SCALE_SUFFIX) + PACKED_SUFFIX not in checkpoint.tensors:
                raise CheckpointError(f"{tensor.path}: tensor {tensor.name} has no packed weight beside it")
        else:
            steps.append(copy_step(checkpoint, tensor))
    options = {"command": "dequantize", "dtype": dtype}
    return Conversion(checkpoint, steps, _plain_config(checkpoint.config, dtype), options, max_shard_bytes)


def check_nl4(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the checkpoint's ``quantization_config`` after checking that this program can read its format.

    Raises:
        CheckpointError: it is missing, of another method, version or codebook.
    """
    where = checkpoint.folder / "config.json"
    entry = checkpoint.config.get("quantization_config")
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: no quantization_config: the checkpoint is not quantized")
    needed = {
        "quant_method": codebook.FORMAT_NAME,
        "format_version": codebook.FORMAT_VERSION,
        "group_size": codebook.GROUP_SIZE,
        "codebook": list(codebook.CODEBOOK),
    }
    for key, value in needed.items():
        if entry.get(key) != value:
            raise CheckpointError(f"{where}: quantization_config.{key} is {entry.get(key)!r}, {value!r} can be read")
    return entry


def scale_of(checkpoint: Checkpoint, packed: TensorInfo) -> TensorInfo:
    """The scale tensor that belongs to a packed one, its type and shape checked.

    Raises:
        CheckpointError: it is missing or does not fit.
    """
    name = packed.name.removesuffix(PACKED_SUFFIX) + SCALE_SUFFIX
    scale = checkpoint.tensors.get(name)
    if scale is None:
        raise CheckpointError(f"{packed.path}: tensor {packed.name} has no scale; {name} was expected")
    groups = packed.shape[-1] * 2 // codebook.GROUP_SIZE
    fits = packed.shape[-1] * 2 == groups * codebook.GROUP_SIZE and scale.shape == (*packed.shape[:-1], groups)
    if packed.dtype != "U8" or scale.dtype != "F16" or not fits:
        raise CheckpointError(
            f"{packed.path}: tensor {packed.name} {packed.dtype} {list(packed.shape)} and its scale {scale.dtype} "
            f"{list(scale.shape)} do not belong together; U8 [..., K/2] and F16 [..., K/16] are needed"
        )
    return scale


def _dequantize_step(checkpoint: Checkpoint, packed: TensorInfo, scale: TensorInfo, dtype: WeightDtype) -> Step:
    rows = packed.elements // packed.shape[-1]
    packed_columns, groups = packed.shape[-1], scale.shape[-1]
    columns = packed_columns * 2
    rows_per_piece = max(1, min(rows, _PIECE_WEIGHTS // columns))

    def produce(number: int) -> tuple[NDArray[np.generic]]:
        first = number * rows_per_piece
        count = min(rows_per_piece, rows - first)
        indices = checkpoint.read(packed.name, first * packed_columns, count * packed_columns)
        scales = checkpoint.read(scale.name, first * groups * 2, count * groups * 2)
        weight = codebook.dequantize(
            raw_array(indices, "U8", (count, packed_columns)).astype(np.uint8, copy=False),
            raw_array(scales, "F16", (count, groups)).astype(np.float16, copy=False),
        )
        if not np.isfinite(weight).all():
            raise CheckpointError(f"{scale.path}: tensor {scale.name} holds NaN or infinity")
        return (from_float32(weight, _SAFETENSORS_DTYPES[dtype]),)

    output = OutputTensor(
        packed.name.removesuffix(PACKED_SUFFIX),
        _SAFETENSORS_DTYPES[dtype],
        (*packed.shape[:-1], columns),
        packed.path.name,
    )
    return Step((output,), -(-rows // rows_per_piece), produce)


def _plain_config(config: dict[str, Any], dtype: WeightDtype) -> dict[str, Any]:
    """The config without quantization, its type (in every part that states one, under either name) set."""
    plain = copy.deepcopy(config)
    plain.pop("quantization_config", None)
    parts = [plain, *(part for part in plain.values() if isinstance(part, dict))]
    for part in parts:
        for key in ("torch_dtype", "dtype"):
            if key in part:
                part[key] = dtype
    if "dtype" not in plain:
        plain["torch_dtype"] = dtype
    return plain
