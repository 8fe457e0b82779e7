"""Files that others made: whatever is wrong with one becomes an error that names it. And sizes in words."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from step128_checkpoint.errors import CheckpointError, InputNotFoundError, PermissionDeniedError

_MAX_JSON_DEPTH = 50


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into ours; ``path`` is named where the error itself names no file.

    Raises:
        InputNotFoundError: the file does not exist.
        PermissionDeniedError: it may not be read.
        CheckpointError: it is a folder, lies below a file, the disk failed, ...
    """
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if isinstance(error, FileNotFoundError):
            raise InputNotFoundError(f"{where}: no such file") from None
        if isinstance(error, PermissionError):
            raise PermissionDeniedError(f"{where}: cannot be read: permission denied") from error
        raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: it cannot be read, is not JSON, holds no object, or is nested so deeply that it is no config.
    """
    try:
        with reading(path):
            value = json.loads(path.read_text(encoding="utf-8"))
        too_deep = _deeper_than(value, _MAX_JSON_DEPTH)
    except ValueError as error:  # also what is not UTF-8, and numbers of thousands of digits
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    except RecursionError:
        too_deep = True
    if too_deep:
        raise CheckpointError(f"{path}: nested more than {_MAX_JSON_DEPTH} levels deep; no checkpoint's file is")
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is needed")
    return value


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk: what was renamed into it has its name there even if the power fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_text(size_bytes: float) -> str:
    """A size for people, in the unit that leaves one to three digits before the point."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size_bytes >= 1000 and units[1:]:
        size_bytes /= 1000
        del units[0]
    return f"{size_bytes:.{0 if units[0] == 'bytes' else 2}f} {units[0]}"


def _deeper_than(value: Any, levels: int) -> bool:
    """Whether lists and objects lie more than ``levels`` deep in each other; level by level, so without recursion."""
    level = [value]
    for _ in range(levels + 1):
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in nested for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return False
    return True
