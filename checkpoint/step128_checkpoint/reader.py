"""Reads sharded safetensors checkpoints: headers first and validated, then bytes by position.

Bytes are read with ``pread`` rather than mapped: a read that fails is an error with a name instead of SIGBUS, worker
threads share one descriptor, and the memory used is what was asked for, not whatever the page cache holds.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from step128_checkpoint.errors import CheckpointError, InputNotFoundError
from step128_checkpoint.files import read_json_object, reading
from step128_checkpoint.header import TensorInfo, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"


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
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise CheckpointError(f"{self.folder / 'config.json'}: num_hidden_layers is {layers!r}, a count is needed")
        return layers

    def fingerprint(self) -> str:
        """SHA-256, in hex, of the config and the shards' names, sizes and times: whether a run goes on with its input.

        Copying a checkpoint changes it, and no data is read. See :func:`manifest.headers_sha256` for what lasts.
        """
        shards = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in self.shard_paths]
        return hashlib.sha256(json.dumps([shards, self.config], sort_keys=True).encode()).hexdigest()

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
        while size > 0:
            try:
                chunk = os.pread(descriptor, size, position)  # may return less than 2 GiB at a time
            except OSError as error:
                raise CheckpointError(f"{tensor.path}: tensor {name} cannot be read: {error}") from error
            if not chunk:
                raise CheckpointError(f"{tensor.path}: ends inside tensor {name}: the file changed while being read")
            chunks.append(chunk)
            position += len(chunk)
            size -= len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def open_files(self) -> None:
        """Open every shard; :meth:`read` needs it."""
        for path in self.shard_paths:
            if path not in self._descriptors:
                with reading(path):
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
        PermissionDeniedError: one of them may not be read.
        CheckpointError: a shard is missing or bad, or index and shards contradict each other. Names file and tensor.
    """
    with reading(folder):
        if not folder.is_dir():
            raise InputNotFoundError(f"{folder}: no such folder")
        config = read_json_object(folder / "config.json")
        shards = _shards(folder)
    tensors: dict[str, TensorInfo] = {}
    for path, expected in shards.items():
        header = read_header(path)
        if expected is not None:
            if missing := sorted(expected - set(header)):
                raise CheckpointError(f"{path}: {_and_more(missing)} missing, although {INDEX_NAME} promises it here")
            if unknown := sorted(set(header) - expected):
                raise CheckpointError(f"{path}: holds {_and_more(unknown)}, which {INDEX_NAME} does not place there")
        tensors |= header
    return Checkpoint(folder, config, tensors)


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
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(f"{index_path}: tensor {name} is placed in {file_name!r}, which is no file name")
    shards: dict[Path, set[str] | None] = {}
    for path in sorted({folder / file_name for file_name in weight_map.values()}):
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
