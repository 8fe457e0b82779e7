"""Weights of a checkpoint as torch tensors, read in slices: the peak is the tensor asked for and one slice.

NL4 weights come dequantized, under the name that they had before they were quantized.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from step128_checkpoint.dequantize import check_nl4, scale_of
from step128_checkpoint.dtypes import FLOAT_DTYPES, raw_array
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.policy import PACKED_SUFFIX
from step128_checkpoint.reader import Checkpoint
from step128_kernels import codebook

_SLICE_WEIGHTS = 8 << 20
_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weight_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """Shape of a weight before quantization.

    Raises:
        CheckpointError: the checkpoint has no such weight, or it is of a type that cannot be computed with.
    """
    if packed := checkpoint.tensors.get(name + PACKED_SUFFIX):
        return (*packed.shape[:-1], 2 * packed.shape[-1])
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{checkpoint.folder}: weight {name} is missing. Run `verify` to see what else is.")
    if tensor.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{tensor.path}: weight {name} has type {tensor.dtype}; {', '.join(sorted(FLOAT_DTYPES))} can be used"
        )
    return tensor.shape


def load_weight(checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Read one weight, by its name before quantization; the checkpoint's files are open.

    Raises:
        CheckpointError: it is missing, of another type than a weight may have, or its NL4 parts do not fit.
    """
    target = torch.empty(weight_shape(checkpoint, name), dtype=dtype, device=device)
    copy_rows(checkpoint, name, target)
    return target


def copy_rows(checkpoint: Checkpoint, name: str, target: Tensor, first_row: int = 0) -> None:
    """Read rows of a weight into ``target``, from ``first_row`` on; a row is all that lies along the last dimension.

    ``target`` is contiguous and holds whole rows, for instance one expert's ``[N, K]``: from row ``expert * N`` on.

    Raises:
        CheckpointError: see :func:`load_weight`.
    """
    columns = weight_shape(checkpoint, name)[-1]
    rows = target.view(-1, columns)
    rows_per_slice = max(1, _SLICE_WEIGHTS // columns)
    for start in range(0, rows.shape[0], rows_per_slice):
        part = rows[start : start + rows_per_slice]
        part.copy_(_read_rows(checkpoint, name, first_row + start, part.shape[0], columns))


def _read_rows(checkpoint: Checkpoint, name: str, first: int, count: int, columns: int) -> Tensor:
    packed = checkpoint.tensors.get(name + PACKED_SUFFIX)
    if packed is None:
        dtype = _TORCH_DTYPES[checkpoint.tensors[name].dtype]
        row_bytes = columns * dtype.itemsize
        # A bytearray, since torch views only memory that may be written; this second copy is one slice.
        data = bytearray(checkpoint.read(name, first * row_bytes, count * row_bytes))
        return torch.frombuffer(data, dtype=dtype).view(count, columns)
    check_nl4(checkpoint)
    scale = scale_of(checkpoint, packed)
    groups = columns // codebook.GROUP_SIZE
    codes = checkpoint.read(packed.name, first * (columns // 2), count * (columns // 2))
    scales = checkpoint.read(scale.name, first * groups * 2, count * groups * 2)
    weight = codebook.dequantize(
        raw_array(codes, "U8", (count, columns // 2)).astype(np.uint8, copy=False),
        raw_array(scales, "F16", (count, groups)).astype(np.float16, copy=False),
    )
    return torch.from_numpy(weight)
