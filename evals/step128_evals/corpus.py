"""Texts that are on every machine: Python's own standard library, as code, and its handbook, as prose."""

from __future__ import annotations

import platform
import pydoc_data.topics
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from step128_evals.errors import BadInputError, InputNotFoundError
from step128_evals.files import read_text, sha256

_NOT_TEXT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
_NOT_EVERYWHERE = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo", "turtle.py", "venv"}
"""What distributions package apart from the rest of Python, or leave out."""

_BUILT = ("_sysconfigdata", "_sysconfig_vars", "config-", "sitecustomize", "usercustomize")
"""How the names begin of what a build of Python, or its packager, writes: paths and compiler flags."""


@dataclass(frozen=True)
class SourceFile:
    """``name`` is relative to the corpus's folder, with forward slashes."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Files in a fixed order. ``label`` names them for people; two corpora are equal if :attr:`sha256` is."""

    label: str
    files: tuple[SourceFile, ...]

    @cached_property
    def sha256(self) -> str:
        """Of all names and texts."""
        return sha256("".join(f"{file.name}\0{file.text}\0" for file in self.files))


def python_corpus(folder: Path | None = None) -> Corpus:
    """The ``*.py`` files of a folder (None: the standard library of this Python), sorted by name.

    Of the standard library, its tests are left out, and all that a build writes or that a distribution may package
    apart: two machines with the same release of Python have the same corpus, unless a distribution patches modules.
    The label of a folder is its own name, however its path is spelled.

    Raises:
        InputNotFoundError: no such folder.
        BadInputError: it has no Python file.
    """
    root = (folder or Path(sysconfig.get_paths()["stdlib"])).resolve()
    if not root.is_dir():
        raise InputNotFoundError(f"{root}: no such folder")
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if folder is None and _left_out(relative):
            continue
        try:
            files.append(SourceFile(relative.as_posix(), read_text(path)))
        except BadInputError:
            continue  # a file in another encoding: a few of the standard library's
    if not files:
        raise BadInputError(f"{root} has no Python file in UTF-8")
    return Corpus(root.name if folder else f"the standard library of Python {platform.python_version()}", tuple(files))


def _left_out(relative: Path) -> bool:
    parts = set(relative.parts)
    return bool(parts & (_NOT_TEXT | _NOT_EVERYWHERE)) or any(part.startswith(_BUILT) for part in parts)


def prose() -> str:
    """About 0.6 MB of English: the language reference that Python's ``help()`` shows, topic after topic."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))
