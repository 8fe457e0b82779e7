"""Texts that are on every machine: Python's own standard library, as code, and its handbook, as prose."""

from __future__ import annotations

import pydoc_data.topics
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from step128_evals.errors import BadInputError, InputNotFoundError
from step128_evals.files import read_text, sha256


@dataclass(frozen=True)
class SourceFile:
    """``name`` is relative to the corpus's folder, with forward slashes."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Files in a fixed order. ``label`` says where they are from; two corpora are equal if :attr:`sha256` is."""

    label: str
    files: tuple[SourceFile, ...]

    @cached_property
    def sha256(self) -> str:
        """Of all names and texts."""
        return sha256("".join(f"{file.name}\0{file.text}\0" for file in self.files))


def python_corpus(folder: Path | None = None) -> Corpus:
    """The ``*.py`` files of a folder (None: the standard library of this Python, without its tests), sorted by name.

    Raises:
        InputNotFoundError: no such folder.
        BadInputError: it has no Python file.
    """
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise InputNotFoundError(f"{root}: no such folder")
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__", "pydoc_data"}
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if folder is None and left_out & set(relative.parts):
            continue
        try:
            files.append(SourceFile(relative.as_posix(), read_text(path)))
        except BadInputError:
            continue  # a file in another encoding: a few of the standard library's
    if not files:
        raise BadInputError(f"{root} has no Python file in UTF-8")
    version = sysconfig.get_python_version()
    return Corpus(str(folder) if folder else f"the standard library of Python {version}", tuple(files))


def prose() -> str:
    """About 0.6 MB of English: the language reference that Python's ``help()`` shows, topic after topic."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))
