"""Local files: read with errors for people, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from step128_evals.errors import BadInputError, CannotWriteError, EvalError, InputNotFoundError, PermissionDeniedError


@contextmanager
def explained_os_errors(path: Path) -> Iterator[None]:
    """Turn what goes wrong when reading a file into an :class:`EvalError`.

    Raises:
        InputNotFoundError: there is none.
        PermissionDeniedError: it may not be read.
        BadInputError: anything else, a folder for instance.
    """
    try:
        yield
    except OSError as error:
        kinds: dict[type[OSError], type[EvalError]] = {
            FileNotFoundError: InputNotFoundError,
            PermissionError: PermissionDeniedError,
        }
        raise kinds.get(type(error), BadInputError)(f"{path}: {error.strerror}") from None


def read_text(path: Path) -> str:
    """Read a UTF-8 text; raises as :func:`explained_os_errors`, and BadInputError if it is not UTF-8."""
    try:
        with explained_os_errors(path):
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path}: not UTF-8 text: {error}") from error


def read_text_argument(argument: str) -> str:
    """Read the file that an option names, or standard input for ``-``; raises as :func:`read_text`."""
    if argument != "-":
        return read_text(Path(argument))
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(f"standard input is not UTF-8 text: {error}") from error


def sha256(text: str) -> str:
    """Hexadecimal SHA-256 of a text's UTF-8 form: how settings name a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, then rename it.

    Raises:
        CannotWriteError: its folder cannot be made or written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CannotWriteError(f"{error.filename or path}: {error.strerror}") from error
