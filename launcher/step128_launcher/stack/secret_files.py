"""The stack's secrets, one a file, in a folder that is the user's alone."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.files import cannot_write, write_atomically

# name -> what it opens
NAMES = {
    "api_key": "the model: what clients send",
    "metrics_token": "vLLM's /metrics: what Prometheus sends",
    "grafana_password": "Grafana, as its administrator",
}
# Compose mounts the files themselves, with owner and mode as they are, and each container reads as a user of its own
# (10001, 65534, 472), that is as anybody. Others of this machine are kept out by the folder.
FILE_MODE, FOLDER_MODE = 0o644, 0o700
_BYTES = 32


@dataclass(frozen=True)
class SecretFile:
    """A secret's file, and what was done: "made", "rotated" or "kept"."""

    path: Path
    opens: str
    done: str


def make_secrets(folder: Path, *, rotate: bool = False) -> list[SecretFile]:
    """Write those that are missing, with `rotate` all; one that is there is only made readable for the containers.

    Raises:
        LauncherError: 78, if others may enter the folder; 5 or 73, if it cannot be written.

    """
    try:
        if not folder.is_dir():
            folder.mkdir(mode=FOLDER_MODE, parents=True)
        mode = folder.stat().st_mode & 0o777
    except OSError as error:
        raise _elsewhere(cannot_write(folder, error)) from error
    if mode & 0o077:
        raise LauncherError(
            ExitCode.BAD_CONFIGURATION,
            f"Others may enter or list {folder} (mode {mode:04o}). The files in it have to be readable by all, since "
            "each container is a user of its own; so nobody else may get at the folder. Nothing was written.",
            f"`chmod 700 {folder}`, or name another folder (SECRETS_DIR in .env).",
        )
    try:
        return [_make(folder / name, opens, rotate) for name, opens in NAMES.items()]
    except LauncherError as error:
        raise error if error.exit_code is ExitCode.BAD_CONFIGURATION else _elsewhere(error) from error


def _make(path: Path, opens: str, rotate: bool) -> SecretFile:
    try:
        there = os.path.lexists(path)
        if there and not rotate:
            if not path.is_file() or not path.stat().st_size:
                raise LauncherError(
                    ExitCode.BAD_CONFIGURATION,
                    f"{path} is there and holds no secret: it is {'empty' if path.is_file() else 'not a file'}.",
                    "Remove it; it is made anew then.",
                )
            if path.stat().st_mode & 0o777 != FILE_MODE:
                path.chmod(FILE_MODE)
            return SecretFile(path, opens, "kept")
        write_atomically(path, secrets.token_urlsafe(_BYTES) + "\n")
        path.chmod(FILE_MODE)  # whatever the umask
    except OSError as error:
        raise cannot_write(path, error) from error
    return SecretFile(path, opens, "rotated" if there else "made")


def _elsewhere(error: LauncherError) -> LauncherError:
    """Return the error with the hint that helps here."""
    return LauncherError(error.exit_code, error.message, "Choose another folder (SECRETS_DIR in .env).")
