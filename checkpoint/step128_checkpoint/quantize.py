"""Quantizes a checkpoint to NL4: chosen weights become ``<name>_packed`` and ``<name>_scale``, the rest is carried.

A piece of work is a block of rows of one matrix (one expert's, for 3-D weights), about a million weights. Peak memory
is about 40 MB and 25 MB more for each job, whatever the size of the checkpoint.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from step128_checkpoint.conversion import DEFAULT_MAX_SHARD_BYTES, Conversion, copy_step
from step128_checkpoint.dtypes import BYTES_PER_ELEMENT, FLOAT_DTYPES, to_float32
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.expected import structure_problems
from step128_checkpoint.files import reading
from step128_checkpoint.header import TensorInfo, read_header
from step128_checkpoint.layout import OutputTensor
from step128_checkpoint.policy import PACKED_SUFFIX, SCALE_SUFFIX, Policy
from step128_checkpoint.reader import Checkpoint
from step128_checkpoint.shards import Step
from step128_kernels import codebook

_PIECE_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class Importance:
    """Weights of the squared error for each input channel: tensor name -> shape [K], or [E, K] for 3-D weights."""

    path: Path
    source: Checkpoint
    sha256: str

    def of_matrix(self, tensor: TensorInfo, matrix: int) -> NDArray[np.float32] | None:
        """The float32 [K] of one matrix of a tensor, or None if the file has nothing for this tensor."""
        info = self.source.tensors.get(tensor.name)
        if info is None:
            return None
        columns = tensor.shape[-1]
        row_bytes = columns * BYTES_PER_ELEMENT[info.dtype]
        start_bytes = matrix * row_bytes if len(info.shape) == 2 else 0
        return to_float32(self.source.read(tensor.name, start_bytes, row_bytes), info.dtype, (columns,))


def open_importance(path: Path, checkpoint: Checkpoint) -> Importance:
    """Open an importance file and check its names, shapes and types against the checkpoint; its files stay open.

    Raises:
        CheckpointError: a tensor is unknown to the checkpoint, or its shape is neither [K] nor [E, K].
    """
    tensors = read_header(path)
    for name, info in tensors.items():
        weight = checkpoint.tensors.get(name)
        if weight is None or len(weight.shape) < 2:
            raise CheckpointError(f"{path}: {name} is no weight of {checkpoint.folder}")
        allowed = [weight.shape[-1:]]
        if len(weight.shape) == 3:
            allowed.append((weight.shape[0], weight.shape[-1]))
        if info.shape not in allowed or info.dtype not in FLOAT_DTYPES:
            wanted = " or ".join(str(list(shape)) for shape in allowed)
            raise CheckpointError(
                f"{path}: {name} is {info.dtype} {list(info.shape)}, a float tensor {wanted} is needed"
            )
    with reading(path), path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    source = Checkpoint(path.parent, {}, tensors)
    source.open_files()
    return Importance(path, source, digest)


def plan_quantization(
    checkpoint: Checkpoint,
    policy: Policy,
    scale_search: codebook.ScaleSearch = "mse",
    importance: Importance | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> Conversion:
    """Decide, from headers alone, what becomes of every tensor.

    Raises:
        CheckpointError: the input is quantized already, contradicts its config.json (a tensor is missing, unknown or of
            a wrong shape or type), or K is no multiple of 16. Names the tensor.
    """
    _refuse_quantized(checkpoint)
    if problems := structure_problems(checkpoint):
        more = f" (`step128-checkpoint inspect` shows {len(problems) - 1} more)" if problems[1:] else ""
        raise CheckpointError(problems[0] + more)
    layers = checkpoint.num_hidden_layers
    steps: list[Step] = []
    found: set[str] = set()
    for tensor in checkpoint.tensors.values():
        component = policy.component_of(tensor.name, layers)
        found |= {component} if component else set()
        chosen = component in policy.components
        steps.append(
            _quantize_step(checkpoint, tensor, scale_search, importance) if chosen else copy_step(checkpoint, tensor)
        )
    present = [component for component in policy.components if component in found]
    entry = {
        "quant_method": codebook.FORMAT_NAME,
        "format_version": codebook.FORMAT_VERSION,
        "group_size": codebook.GROUP_SIZE,
        "bits_per_weight": codebook.BITS_PER_WEIGHT,
        "codebook": list(codebook.CODEBOOK),
        "scale_dtype": "float16",
        "policy": policy.name,
        "quantized_components": present,
        "unquantized_components": [name for name in policy.patterns if name in found and name not in present],
        "scale_search": scale_search,
        "importance": importance.sha256 if importance else None,
    }
    options = {"command": "quantize", **{key: entry[key] for key in ("policy", "scale_search", "importance")}}
    options["quantized_components"] = present
    return Conversion(checkpoint, steps, checkpoint.config | {"quantization_config": entry}, options, max_shard_bytes)


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    for config in (checkpoint.config, checkpoint.text_config):
        if entry := config.get("quantization_config"):
            method = entry.get("quant_method") if isinstance(entry, dict) else entry
            raise CheckpointError(
                f"{checkpoint.folder / 'config.json'}: the checkpoint is quantized already (quant_method {method!r}). "
                "Start from the bf16, fp16 or fp32 checkpoint."
            )
    for tensor in checkpoint.tensors.values():
        if tensor.name.endswith((f"weight{PACKED_SUFFIX}", f"weight{SCALE_SUFFIX}")):
            raise CheckpointError(f"{tensor.path}: tensor {tensor.name} shows that the checkpoint is quantized already")


def _quantize_step(
    checkpoint: Checkpoint, tensor: TensorInfo, scale_search: codebook.ScaleSearch, importance: Importance | None
) -> Step:
    where = f"{tensor.path}: tensor {tensor.name}"
    rows, columns = tensor.shape[-2:]
    if columns % codebook.GROUP_SIZE:
        raise CheckpointError(
            f"{where} has shape {list(tensor.shape)}: its last dimension, {columns}, must be a multiple of "
            f"{codebook.GROUP_SIZE} to be quantized. Choose a policy that leaves it out."
        )
    rows_per_piece = max(1, min(rows, _PIECE_WEIGHTS // columns))
    pieces_per_matrix = -(-rows // rows_per_piece)
    row_bytes = columns * BYTES_PER_ELEMENT[tensor.dtype]

    def produce(number: int) -> tuple[NDArray[np.generic], ...]:
        matrix, block = divmod(number, pieces_per_matrix)
        first = block * rows_per_piece
        count = min(rows_per_piece, rows - first)
        data = checkpoint.read(tensor.name, (matrix * rows + first) * row_bytes, count * row_bytes)
        weight = to_float32(data, tensor.dtype, (count, columns))
        weighting = importance.of_matrix(tensor, matrix) if importance else None
        try:
            return codebook.quantize(weight, weighting, scale_search)
        except ValueError as error:
            position = f"matrix {matrix}, " if len(tensor.shape) == 3 else ""
            raise CheckpointError(f"{where}, {position}rows {first} to {first + count - 1}: {error}") from error

    packed = (*tensor.shape[:-1], columns // 2)
    scale = (*tensor.shape[:-1], columns // codebook.GROUP_SIZE)
    outputs = (
        OutputTensor(tensor.name + PACKED_SUFFIX, "U8", packed, tensor.path.name),
        OutputTensor(tensor.name + SCALE_SUFFIX, "F16", scale, tensor.path.name),
    )
    return Step(outputs, math.prod(tensor.shape[:-2]) * pieces_per_matrix, produce)
