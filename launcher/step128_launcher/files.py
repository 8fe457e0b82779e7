"""Files in the state folder: written whole or not at all, private to the user."""

import os
import secrets
from pathlib import Path

from step128_launcher.errors import ExitCode, LauncherError


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Write `text` under a temporary name, flush it to the disk and rename it to `path`.

    Raises:
        LauncherError: 5 or 73, if the folder does not allow it.

    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise cannot_write(path, error) from error


def make_private_folder(path: Path) -> None:
    """Create `path` and its parents, readable by this user only.

    Raises:
        LauncherError: 5 or 73, if that is not possible.

    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> LauncherError:
    """Return the error to show when `path` cannot be written."""
    code = ExitCode.PERMISSION if isinstance(error, PermissionError) else ExitCode.CANNOT_WRITE
    return LauncherError(code, f"{path} cannot be written: {error.strerror}.", "Choose another --state-dir.")
