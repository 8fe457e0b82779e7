"""The server's keys, from a file or the environment: the API key, else generated once and kept in the state folder, and
the metrics token, if there is one.
"""

import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from step128_launcher.access import METRICS_TOKEN_VARIABLE
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.files import write_atomically

KEY_VARIABLES = ("STEP128_API_KEY", "VLLM_API_KEY")
_EXAMPLE = "python -c 'import secrets; print(secrets.token_urlsafe(32))'"


@dataclass(frozen=True)
class ApiKey:
    """A key, where the user finds it, and a word that a shell expands to it (never the key itself in a message)."""

    value: str
    source: str
    shell_word: str

    def __repr__(self) -> str:
        return f"ApiKey(source={self.source!r})"


def find_api_key(
    key_file: Path | None, environment: Mapping[str, str], state_dir: Path, *, generate: bool = True
) -> ApiKey:
    """Return the key; order: `key_file`, STEP128_API_KEY, VLLM_API_KEY, the state folder's, a new one written there.

    Without `generate` nothing is written, and a key that is still to be generated has an empty value.

    Raises:
        LauncherError: 66 or 5, if `key_file` cannot be read; 78, if the key is not one line of printable ASCII; 5 or
            73, if a new key cannot be written.

    """
    if key_file is not None:
        return _from_file(key_file)
    for variable in KEY_VARIABLES:
        if variable in environment:
            return _from_variable(variable, environment)
    kept = state_dir / "api_key"
    if not kept.exists():
        if not generate:
            return ApiKey("", f"the file {kept}, made at the first start", _shell_word(kept))
        write_atomically(kept, secrets.token_urlsafe(32) + "\n")
    return _from_file(kept)


def find_metrics_token(
    token_file: Path | None, environment: Mapping[str, str], api_key: ApiKey | None = None
) -> ApiKey | None:
    """Return the token for vLLM's /metrics: from `token_file`, else STEP128_METRICS_TOKEN, else None.

    Raises:
        LauncherError: as `find_api_key`; 78 also, if it is the `api_key`, which opens more.

    """
    if token_file is not None:
        token = _from_file(token_file, "metrics token")
    elif METRICS_TOKEN_VARIABLE in environment:
        token = _from_variable(METRICS_TOKEN_VARIABLE, environment)
    else:
        return None
    if api_key is not None and token.value == api_key.value:
        raise LauncherError(
            ExitCode.BAD_CONFIGURATION,
            f"The metrics token ({token.source}) is the API key: who scrapes could then use the model.",
            f"Put another into it, for example: {_EXAMPLE}",
        )
    return token


def _from_variable(variable: str, environment: Mapping[str, str]) -> ApiKey:
    value = _checked(environment[variable], f"The environment variable {variable}")
    return ApiKey(value, f"the environment variable {variable}", f'"${variable}"')


def _from_file(path: Path, what: str = "API key") -> ApiKey:
    try:
        text = path.read_bytes().decode("utf-8", errors="surrogateescape")
    except FileNotFoundError as error:
        raise LauncherError(ExitCode.INPUT_NOT_FOUND, f"The {what} file {path} does not exist.") from error
    except OSError as error:
        code = ExitCode.PERMISSION if isinstance(error, PermissionError) else ExitCode.BAD_CONFIGURATION
        raise LauncherError(code, f"The {what} file {path} cannot be read: {error.strerror}.") from error
    return ApiKey(_checked(text, f"The {what} file {path}"), f"the file {path}", _shell_word(path))


def _shell_word(path: Path) -> str:
    return f'"$(cat {shlex.quote(str(path))})"'


def _checked(text: str, source: str) -> str:
    """Return the key without the blanks around it; it travels in an HTTP header, so nothing but ASCII will do."""
    value = text.strip()
    if not value:
        raise LauncherError(ExitCode.BAD_CONFIGURATION, f"{source} is empty.", "Put a key into it, or do without it.")
    if not (value.isascii() and value.isprintable()):
        raise LauncherError(
            ExitCode.BAD_CONFIGURATION,
            f"{source} holds something else than one line of printable ASCII.",
            f"A key for example: {_EXAMPLE}",
        )
    return value
