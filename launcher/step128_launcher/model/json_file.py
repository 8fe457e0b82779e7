"""JSON out of a checkpoint's files; whatever is wrong with one of them is said, naming the file."""

import json
from pathlib import Path
from typing import Any

from step128_launcher.errors import CheckpointError, ExitCode, LauncherError


def read_json(path: Path) -> Any:
    """Return the document in `path`.

    Raises:
        FileNotFoundError: for the caller, who knows whether the file must exist.
        LauncherError: 5, if it may not be read.
        CheckpointError: 65, if it is no file or no JSON.

    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    return parse_json(raw, f"{path} is not valid JSON")


def parse_json(raw: bytes, complaint: str) -> Any:
    """Return the document in `raw`.

    Raises:
        CheckpointError: 65, `complaint` and what is wrong, if it is no JSON.

    """
    try:
        return json.loads(raw.decode("utf-8"))
    except RecursionError as error:
        raise CheckpointError(f"{complaint}: nested too deeply.") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, or a number with thousands of digits
        raise CheckpointError(f"{complaint}: {error}.") from error


def unreadable(path: Path, error: OSError) -> LauncherError:
    """Return the error to show when a file of the checkpoint cannot be read."""
    if isinstance(error, PermissionError):
        return LauncherError(ExitCode.PERMISSION, f"{path} cannot be read: permission denied.")
    return CheckpointError(f"{path} cannot be read: {error.strerror}.")
