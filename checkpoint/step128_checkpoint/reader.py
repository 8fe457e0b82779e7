"""Reads sharded safetensors checkpoints: headers first and validated, then bytes by position.

Bytes are read with ``pread`` rather than mapped: a read that fails is an error with a name instead of SIGBUS, worker
threads share one descriptor, and the memory used is what was asked for, not whatever the page cache holds.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from step128_checkpoint.dtypes import BYTES_PER_ELEMENT
from step128_checkpoint.errors import CheckpointError, InputNotFoundError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"
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
        InputNotFoundError: the file does not exist.
        CheckpointError: it is no safetensors file, is cut short, or its header contradicts itself or the file's size.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if file_bytes < 8 or header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or cut short: {file_bytes} bytes, header of {header_bytes} bytes "
                    "announced. Download it again."
                )
            header = json.loads(stream.read(header_bytes))
    except FileNotFoundError:
        raise InputNotFoundError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
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
    except (KeyError, TypeError, ValueError) as error:
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


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, opened for reading. ``tensors`` are ordered by file, then by position.

    Use as a context manager: it closes the files that :meth:`read` opened.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    _descriptors: dict[Path, int] = field(default_factory=dict, repr=False, compare=False)

    @property
    def shard_paths(self) -> list[Path]:
        """The safetensors files, in name order."""
        return sorted({tensor.path for tensor in self.tensors.values()})

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of config.json (the whole of it for a text-only model)."""
        text = self.config.get("text_config", self.config)
        if not isinstance(text, dict):
            raise CheckpointError(f"{self.folder / 'config.json'}: text_config is not an object")
        return text

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers of the trunk; multi-token-prediction layers are numbered after them."""
        layers = self.text_config.get("num_hidden_layers")
        if not isinstance(layers, int) or layers < 1:
            raise CheckpointError(f"{self.folder / 'config.json'}: num_hidden_layers is {layers!r}, a count is needed")
        return layers

    def read(self, name: str, start_bytes: int = 0, size_bytes: int | None = None) -> bytes:
        """Read ``size_bytes`` of a tensor (to its end if None) from ``start_bytes`` within it.

        Safe to call from several threads once the file was opened by :meth:`open_files`.

        Raises:
            CheckpointError: the file got shorter since its header was read, or the disk failed.
        """
        tensor = self.tensors[name]
        size = tensor.size_bytes - start_bytes if size_bytes is None else size_bytes
        descriptor = self._descriptors[tensor.path]
        chunks: list[bytes] = []
        position = tensor.offset_bytes + start_bytes
        try:
            while size > 0:
                chunk = os.pread(descriptor, size, position)  # may return less than 2 GiB at a time
                if not chunk:
                    raise CheckpointError(
                        f"{tensor.path}: ends inside tensor {name}: the file changed while being read"
                    )
                chunks.append(chunk)
                position += len(chunk)
                size -= len(chunk)
        except OSError as error:
            raise CheckpointError(f"{tensor.path}: tensor {name} cannot be read: {error}") from error
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def open_files(self) -> None:
        """Open every shard; :meth:`read` needs it."""
        for path in self.shard_paths:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)

    def __enter__(self) -> Self:
        self.open_files()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json, the index and every shard's header; no tensor data yet.

    Raises:
        InputNotFoundError: the folder, its config.json or all weights are missing.
        CheckpointError: a shard is missing or bad, or index and shards contradict each other. Names file and tensor.
    """
    if not folder.is_dir():
        raise InputNotFoundError(f"{folder}: no such folder")
    config = read_json_object(folder / "config.json")
    tensors: dict[str, TensorInfo] = {}
    for path, expected in _shards(folder).items():
        header = read_header(path)
        if expected is not None:
            if missing := sorted(expected - set(header)):
                raise CheckpointError(f"{path}: {_and_more(missing)} missing, although {INDEX_NAME} promises it here")
            if unknown := sorted(set(header) - expected):
                raise CheckpointError(f"{path}: holds {_and_more(unknown)}, which {INDEX_NAME} does not place there")
        tensors |= header
    return Checkpoint(folder, config, tensors)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; errors name the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputNotFoundError(f"{path}: no such file; a checkpoint folder needs it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is needed")
    return value


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """Weight files in name order, each with the tensors the index promises there (None: no index)."""
    present = sorted(folder.glob("*.safetensors"))
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        if not present:
            raise InputNotFoundError(f"{folder}: holds no *.safetensors file")
        if [path.name for path in present] != [SINGLE_FILE_NAME]:
            raise CheckpointError(f"{folder}: {len(present)} safetensors files but no {INDEX_NAME}. Download it too.")
        return {present[0]: None}
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map is missing or empty")
    shards: dict[Path, set[str] | None] = {}
    for path in sorted({folder / str(file_name) for file_name in weight_map.values()}):
        expected = {name for name, file_name in weight_map.items() if file_name == path.name}
        if not path.exists():
            raise CheckpointError(
                f"{path}: this shard is missing; {INDEX_NAME} places {_and_more(sorted(expected))} in it. Download it."
            )
        shards[path] = expected
    if stray := [path.name for path in present if path not in shards]:
        raise CheckpointError(
            f"{folder}: {_and_more(stray)} is not named in {INDEX_NAME}. Add its tensors there, or move it away."
        )
    return shards


def _and_more(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
