"""The API key of the server: taken from a file or the environment, or generated once and kept in the state folder."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.files import write_atomically

KEY_VARIABLES = ("STEP128_API_KEY", "VLLM_API_KEY")


@dataclass(frozen=True)
class ApiKey:
    """The key, and where the user finds it (never the key itself in a message)."""

    value: str
    source: str

    def __repr__(self) -> str:
        return f"ApiKey(source={self.source!r})"


def find_api_key(key_file: Path | None, environment: Mapping[str, str], state_dir: Path) -> ApiKey:
    """Return the key; order: `key_file`, STEP128_API_KEY, VLLM_API_KEY, the state folder's, a new one written there.

    Raises:
        LauncherError: 66 or 5, if `key_file` cannot be read; 78, if it or the variable is empty; 5 or 73, if a new key
            cannot be written.

    """
    if key_file is not None:
        return ApiKey(_read(key_file), f"the file {key_file}")
    for variable in KEY_VARIABLES:
        if variable in environment:
            value = environment[variable].strip()
            if not value:
                raise LauncherError(
                    ExitCode.BAD_CONFIGURATION, f"{variable} is set but empty.", "Unset it, or put a key into it."
                )
            return ApiKey(value, f"the environment variable {variable}")
    kept = state_dir / "api_key"
    if not kept.exists():
        write_atomically(kept, secrets.token_urlsafe(32) + "\n")
    return ApiKey(_read(kept), f"the file {kept}")


def _read(path: Path) -> str:
    try:
        value = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError as error:
        raise LauncherError(ExitCode.INPUT_NOT_FOUND, f"The API key file {path} does not exist.") from error
    except OSError as error:
        raise LauncherError(
            ExitCode.PERMISSION, f"The API key file {path} cannot be read: {error.strerror}."
        ) from error
    if not value:
        raise LauncherError(ExitCode.BAD_CONFIGURATION, f"The API key file {path} is empty.")
    return value
