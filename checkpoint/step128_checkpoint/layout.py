"""Plans the bytes of sharded safetensors files before any is written: names, headers, and where each tensor lies."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from step128_checkpoint.dtypes import BYTES_PER_ELEMENT

_SHARD_NAME = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written. ``file_name`` is the input's file; a file that is no numbered shard keeps its name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file_name: str

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * BYTES_PER_ELEMENT[self.dtype]


@dataclass(frozen=True)
class Place:
    """Where a tensor's data lies: ``offset_bytes`` counts from the file's first byte."""

    file_name: str
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class Layout:
    """Every byte of the output's safetensors files, decided before any is written."""

    places: dict[str, Place]
    headers: dict[str, bytes]
    file_sizes_bytes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.file_sizes_bytes.values())

    def index_json(self) -> str:
        """The text of ``model.safetensors.index.json``."""
        total = sum(place.size_bytes for place in self.places.values())
        weight_map = {name: self.places[name].file_name for name in sorted(self.places)}
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def plan_layout(outputs: Sequence[OutputTensor], max_shard_bytes: int) -> Layout:
    """Distribute tensors over shards, in order, each shard at most ``max_shard_bytes`` of data.

    A tensor larger than that gets a shard of its own. Within a shard, wider types come first, so that every tensor is
    aligned to its element size.
    """
    groups: list[list[OutputTensor]] = []
    kept: dict[str, list[OutputTensor]] = {}
    room_bytes = 0
    for output in outputs:
        if not _SHARD_NAME.fullmatch(output.file_name):
            kept.setdefault(output.file_name, []).append(output)
            continue
        if not groups or output.size_bytes > room_bytes:
            groups.append([])
            room_bytes = max_shard_bytes
        groups[-1].append(output)
        room_bytes -= output.size_bytes
    files = {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)} | kept
    places: dict[str, Place] = {}
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    for file_name, group in files.items():
        group.sort(key=lambda output: -BYTES_PER_ELEMENT[output.dtype])
        headers[file_name] = header = _header(group)
        offset = len(header)
        for output in group:
            places[output.name] = Place(file_name, offset, output.size_bytes)
            offset += output.size_bytes
        sizes[file_name] = offset
    return Layout(places, headers, sizes)


def _header(outputs: Sequence[OutputTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in outputs:
        end = offset + output.size_bytes
        entries[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
