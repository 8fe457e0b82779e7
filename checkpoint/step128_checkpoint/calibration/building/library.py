"""Python's own library as material: code, long files, its manual, and functions with what their authors say of them.

It is on every machine, and differs between Python versions. Each file serves one purpose only (by a hash of its name),
so that no held-out text is another part's calibration text.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from step128_checkpoint.calibration.building.documents import Document
from step128_checkpoint.errors import InputNotFoundError

_Purpose = Literal["code", "long", "dialogue"]
# Out of sixteen files: six as code, six in long samples (each takes many), four to talk about.
_PURPOSES: tuple[_Purpose, ...] = ("code",) * 6 + ("long",) * 6 + ("dialogue",) * 4
_NOT_OURS = frozenset({"site-packages", "dist-packages", "__pycache__", "pydoc_data"})
_TESTS = frozenset({"test", "tests", "idle_test"})
_LARGEST_FUNCTION_LINES, _SMALLEST_FUNCTION_LINES = 60, 5
_FEWEST_FILES = 100


@dataclass(frozen=True)
class Function:
    """A function of the library: ``module``, its ``name`` and ``arguments`` as written, docstring and source."""

    module: str
    name: str
    arguments: str
    parameters: tuple[tuple[str, str], ...]
    docstring: str
    source: str

    @property
    def summary(self) -> str:
        """The docstring's first sentence, on one line."""
        return " ".join(self.docstring.split("\n\n")[0].split())


def code_files(rng: random.Random) -> Iterator[Document]:
    """Single source files, tests among them."""
    for path in _shuffled("code", rng):
        if text := _source(path):
            yield Document(path, text=text)


def long_files(rng: random.Random, characters: int) -> Iterator[Document]:
    """Files of at least this length, and smaller ones one after the other under their names, as people paste them."""
    together: list[str] = []
    for path in _shuffled("long", rng):
        text = _source(path)
        if len(text) >= characters:
            yield Document(path, text=text)
            continue
        together.append(f"# File: {path}\n\n{text}")
        if sum(map(len, together)) >= characters:
            yield Document(path, text="\n\n".join(together))
            together = []


def manual(rng: random.Random) -> Iterator[Document]:
    """Chapters of the language reference, and what each module says of itself and its functions."""
    from pydoc_data import topics

    chapters: list[str | Path] = [*sorted(topics.topics), *(Path(name) for name in _files(with_tests=False))]
    rng.shuffle(chapters)
    for chapter in chapters:
        text = topics.topics[chapter] if isinstance(chapter, str) else _module_page(chapter.as_posix())
        if len(text) > 200:
            yield Document(f"manual: {chapter}", text=text)


def functions(rng: random.Random) -> Iterator[Function]:
    """Documented functions and methods, a few of each file, without end."""
    names = [name for name in _files(with_tests=False) if _purpose(name) == "dialogue"]
    while True:
        rng.shuffle(names)
        for name in names:
            found = list(_functions(name))
            yield from rng.sample(found, min(len(found), 4))


def library_file(rng: random.Random) -> tuple[str, str]:
    """Path and text of one file to talk about, of a size that can be shown."""
    names = [name for name in _files(with_tests=False) if _purpose(name) == "dialogue"]
    while True:
        name = rng.choice(names)
        if 1500 < len(text := _source(name)) < 40_000:
            return name, text


def _shuffled(purpose: _Purpose, rng: random.Random) -> list[str]:
    names = [name for name in _files(with_tests=True) if _purpose(name) == purpose]
    rng.shuffle(names)
    return names


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@cache
def _files(with_tests: bool) -> tuple[str, ...]:
    """Paths relative to the library, sorted.

    Raises:
        InputNotFoundError: Python is installed without its sources.
    """
    paths = (path.relative_to(_root()) for path in _root().rglob("*.py"))
    left_out = _NOT_OURS if with_tests else _NOT_OURS | _TESTS
    names = sorted(path.as_posix() for path in paths if not left_out & set(path.parts))
    if len(names) < _FEWEST_FILES:
        raise InputNotFoundError(
            f"{_root()} holds {len(names)} Python source files, at least {_FEWEST_FILES} are needed: install Python "
            "with its library's sources, or use a mixture of your own folders"
        )
    return tuple(names)


def _purpose(name: str) -> _Purpose:
    return _PURPOSES[hashlib.sha256(name.encode()).digest()[0] % len(_PURPOSES)]


def _source(name: str) -> str:
    """Text of a file; empty for the tests' files in odd encodings."""
    try:
        return (_root() / name).read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def _module(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def _functions(name: str) -> tuple[Function, ...]:
    text = _source(name)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return ()
    lines = text.splitlines()
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
            continue
        docstring = ast.get_docstring(node)
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if not docstring or len(docstring) < 30 or not _SMALLEST_FUNCTION_LINES <= length <= _LARGEST_FUNCTION_LINES:
            continue
        body = lines[node.lineno - 1 : node.end_lineno]
        indent = len(body[0]) - len(body[0].lstrip())
        source = "\n".join(line[indent:] if not line[:indent].strip() else line for line in body)
        found.append(Function(_module(name), node.name, ast.unparse(node.args), _parameters(node), docstring, source))
    return tuple(found)


def _parameters(node: ast.FunctionDef) -> tuple[tuple[str, str], ...]:
    """(name, default as written or "") of each parameter that a caller gives by name."""
    arguments = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    defaults = [ast.unparse(default) for default in node.args.defaults]
    pairs = zip(arguments, [""] * (len(arguments) - len(defaults)) + defaults, strict=True)
    named = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    keyword_only = ((argument.arg, ast.unparse(default) if default else "") for argument, default in named)
    return tuple((name, value) for name, value in (*pairs, *keyword_only) if name not in ("self", "cls", "mcs"))


def _module_page(name: str) -> str:
    """What a module's docstrings say, as a page."""
    try:
        tree = ast.parse(_source(name))
    except (SyntaxError, ValueError, RecursionError):
        return ""
    parts = [ast.get_docstring(tree) or ""]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            arguments = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
            parts.append(f"{node.name}{arguments}\n\n    " + docstring.replace("\n", "\n    "))
    body = "\n\n".join(part for part in parts if part)
    return f"{_module(name)}\n{'=' * len(_module(name))}\n\n{body}\n" if body else ""
