"""The header of one safetensors file: which tensors it holds, and where. Validated against the file's size.

Format: 8 bytes little-endian header length, a JSON object name -> {dtype, shape, data_offsets}, then the data, to which
the offsets are relative (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step128_checkpoint.dtypes import BYTES_PER_ELEMENT
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.files import reading

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: ``offset_bytes`` counts from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset_bytes: int

    @property
    def elements(self) -> int:
        """Number of stored elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.elements * BYTES_PER_ELEMENT[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and validate one safetensors file's header; tensors come in file order.

    Raises:
        InputNotFoundError, PermissionDeniedError: the file does not exist, or may not be read.
        CheckpointError: it is no safetensors file, is cut short, or its header contradicts itself or the file's size.
    """
    try:
        with reading(path):
            status = path.stat()
        file_bytes = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a file; a safetensors file is needed")
        with reading(path), path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if file_bytes < 8 or header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or cut short: {file_bytes} bytes, header of {header_bytes} bytes "
                    "announced. Download it again."
                )
            header = json.loads(stream.read(header_bytes))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not JSON ({error}). Download it again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object. Download it again.")
    data_start = 8 + header_bytes
    tensors = [_tensor(path, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: tensor.offset_bytes)
    expected = data_start
    for tensor in tensors:
        if tensor.offset_bytes != expected:
            raise CheckpointError(
                f"{path}: tensor {tensor.name} starts at byte {tensor.offset_bytes}, {expected} expected: the header "
                "is wrong. Download the file again."
            )
        expected += tensor.size_bytes
        if expected > file_bytes:
            raise CheckpointError(
                f"{path}: truncated: tensor {tensor.name} ends at byte {expected}, the file has {file_bytes}. "
                "Download it again."
            )
    if expected != file_bytes:
        raise CheckpointError(f"{path}: {file_bytes - expected} bytes after the last tensor. Download it again.")
    return {tensor.name: tensor for tensor in tensors}


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(length) for length in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: the header entry of tensor {name} is malformed ({error})") from error
    if dtype not in BYTES_PER_ELEMENT:
        raise CheckpointError(f"{path}: tensor {name} has type {dtype}, which is not known here")
    tensor = TensorInfo(name, dtype, shape, path, data_start + begin)
    if min(shape, default=0) < 0 or begin < 0 or end - begin != tensor.size_bytes:
        raise CheckpointError(
            f"{path}: tensor {name} of shape {list(shape)} and type {dtype} needs {tensor.size_bytes} bytes, "
            f"the header gives it {end - begin}"
        )
    return tensor
