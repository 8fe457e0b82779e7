"""The headers of a checkpoint's safetensors shards, checked against the files' sizes; no tensor data is read.

Format: 8 bytes little-endian header length, a JSON object name -> {dtype, shape, data_offsets}, then the data, to which
the offsets are relative (https://huggingface.co/docs/safetensors).
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step128_launcher.errors import CheckpointError
from step128_launcher.model.json_file import parse_json, read_json, unreadable

INDEX_NAME = "model.safetensors.index.json"
_DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}
_DTYPE_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}
_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as its shard's header describes it; `data_start` counts from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    data_start: int
    stored_bytes: int


def read_shards(folder: Path) -> tuple[dict[str, StoredTensor], int]:
    """Read all headers; return name -> tensor, and the number of shards.

    Raises:
        LauncherError: 5, if a file may not be read.
        CheckpointError: naming the file, and the tensor where there is one, if a shard is missing, truncated, no
            safetensors file, or contradicts the index.

    """
    index = _read_index(folder / INDEX_NAME)
    files = sorted(set(index.values())) if index else sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no *.safetensors file.", "Download or make the checkpoint again.")
    _check_complete(folder, files, bool(index))
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _read_header(folder / file):
            if tensor.name in tensors:
                raise CheckpointError(f"Tensor {tensor.name} is in both {tensors[tensor.name].file} and {tensor.file}.")
            tensors[tensor.name] = tensor
    for name, file in index.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(
                f"{folder / INDEX_NAME} says tensor {name} is in {file}, but it is not there.",
                "The shards and the index are from different checkpoints, or the file was damaged; fetch both again.",
            )
    if index and len(tensors) != len(index):
        extra = next(name for name in tensors if name not in index)
        raise CheckpointError(f"Tensor {extra} is in {tensors[extra].file}, but the index {INDEX_NAME} lacks it.")
    return tensors, len(files)


def read_float32_scalar(tensor: StoredTensor) -> float:
    """Read the one value of a float32 tensor of shape [1]."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.data_start)
        value: float = struct.unpack("<f", file.read(4))[0]
    return value


def _read_index(path: Path) -> dict[str, str]:
    """Return tensor name -> shard file name; empty if the checkpoint has no index."""
    try:
        document = read_json(path)
    except FileNotFoundError:
        return {}
    try:
        items = {str(name): str(file) for name, file in document["weight_map"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has no object weight_map (tensor name -> file name).") from error
    outside = {file for file in set(items.values()) if Path(file).name != file}
    if outside:
        name, file = next(item for item in items.items() if item[1] in outside)
        raise CheckpointError(f"{path} puts tensor {name} into {file!r}; a shard must lie in the model folder.")
    return items


def _check_complete(folder: Path, files: list[str], indexed: bool) -> None:
    """Refuse a missing shard: one the index names, or a gap in the numbers -00001-of-00004."""
    wanted = set(files)
    if not indexed:
        for file in files:
            match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.safetensors", file)
            if match:
                count = int(match[3])
                wanted |= {f"{match[1]}-{number:05d}-of-{match[3]}.safetensors" for number in range(1, count + 1)}
    missing = sorted(file for file in wanted if not (folder / file).is_file())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"Shard {folder / missing[0]}{more} is missing: {len(wanted) - len(missing)} of {len(wanted)} are there.",
            "Finish the download, or the command that wrote this checkpoint, and try again.",
        )


def _read_header(path: Path) -> list[StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} is no safetensors file: its header would be {length} bytes long.")
            if 8 + length > size:
                raise CheckpointError(
                    f"{path} is truncated: its header needs {8 + length} bytes, the file has {size}.",
                    "Fetch or write this shard again.",
                )
            raw = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    header = parse_json(raw, f"{path} is no safetensors file: its header is not JSON")
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is no safetensors file: its header is no JSON object.")
    header.pop("__metadata__", None)
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in header.items()]
    _check_extent(path, tensors, 8 + length, size)
    return tensors


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        expected = math.prod(shape) * _DTYPE_BYTES[dtype]
        consistent = begin >= 0 and end - begin == expected and all(size >= 0 for size in shape)
    except KeyError as error:
        raise CheckpointError(f"{path}: tensor {name} has an unknown dtype or lacks a field: {error}.") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header entry of tensor {name} is malformed: {entry!r}.") from error
    if not consistent:
        raise CheckpointError(
            f"{path}: tensor {name} ({dtype} {list(shape)}) needs {expected} bytes, "
            f"its data_offsets are [{begin}, {end}]."
        )
    return StoredTensor(name, path, dtype, shape, data_start + begin, expected)


def _check_extent(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """Refuse data that overlaps, leaves holes, or does not end with the file."""
    position = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.data_start, tensor.stored_bytes)):
        if tensor.data_start != position:
            raise CheckpointError(f"{path}: the data of tensor {tensor.name} does not follow the tensor before it.")
        position += tensor.stored_bytes
        if position > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {tensor.name} ends at byte {position}, the file has {size}.",
                "Fetch or write this shard again.",
            )
    if position != size:
        raise CheckpointError(f"{path} has {size - position} bytes after the last tensor; it is damaged.")
