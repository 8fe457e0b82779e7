"""A user's clone of codeneedle: it has no licence, so its prompt and files are read from there and never shipped."""

from __future__ import annotations

import ast
import string
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step128_evals.errors import BadInputError, InputNotFoundError
from step128_evals.files import read_text, sha256
from step128_evals.needle.codeneedle.targets import LANGUAGES

COMMAND = "git clone https://github.com/alexziskind1/codeneedle"

_TEMPLATE_FIELDS = {
    "file_contents",
    "n",
    "name",
    "file_qualifier",
    "anchor_phrase",
    "signature_marker",
    "thinking_suffix",
}


@dataclass(frozen=True)
class Template:
    """The benchmark's prompt, as format strings; ``anchors`` and ``markers`` are by language (``js``, ``py``)."""

    prompt: str
    anchors: dict[str, str]
    markers: dict[str, str]
    no_think: str

    @property
    def sha256(self) -> str:
        """Of all four."""
        return sha256(repr((self.prompt, sorted(self.anchors.items()), sorted(self.markers.items()), self.no_think)))

    def fill(self, source: str, language: str, name: str, lines: int, no_think: bool) -> str:
        """The prompt that asks for the first ``lines`` body lines of a function of a single-file corpus."""
        return self.prompt.format(
            file_contents=source,
            n=lines,
            name=name,
            file_qualifier="",
            anchor_phrase=self.anchors[language].format(name=name),
            signature_marker=self.markers[language].format(name=name),
            thinking_suffix=self.no_think if no_think else "",
        )


@dataclass(frozen=True)
class CloneCorpus:
    """A source file and how to draw from it. ``source`` has the benchmark's heading line, which names ``path``."""

    name: str
    path: Path
    language: str
    text: str
    count: int
    seed: int

    @property
    def source(self) -> str:
        """What the model reads: the heading line, the file, and an empty line."""
        mark = "//" if self.language == "js" else "#"
        return f"{mark} ====== {self.path} ======\n{self.text}{'' if self.text.endswith(chr(10)) else chr(10)}\n"


def read_template(clone: Path) -> Template:
    """The prompt's constants in ``bench/runner.py``, as data: nothing of the clone is executed.

    Raises:
        InputNotFoundError: no clone there.
        BadInputError: its prompt is laid out in another way than this release knows.
    """
    path = clone / "bench" / "runner.py"
    if not path.is_file():
        raise InputNotFoundError(f"{clone} is no clone of codeneedle (it has no bench/runner.py): {COMMAND}")
    try:
        statements = ast.parse(read_text(path)).body
    except (SyntaxError, ValueError) as error:
        raise BadInputError(f"{path} is not Python: {error}") from error
    constants = {
        statement.targets[0].id: statement.value
        for statement in statements
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    try:
        values = [
            ast.literal_eval(constants[name])
            for name in ("PROMPT_TEMPLATE", "ANCHOR_PHRASE", "SIGNATURE_MARKER", "NO_THINK_SUFFIX")
        ]
        prompt, anchors, markers, no_think = values
        known = _fields(prompt) == _TEMPLATE_FIELDS and isinstance(no_think, str)
        for phrases in (anchors, markers):
            known = known and all(_fields(phrases[language]) <= {"name"} for language in LANGUAGES.values())
    except (KeyError, TypeError, ValueError) as error:
        raise BadInputError(f"{path} does not hold the prompt as this release knows it: {error!r}") from error
    if not known:
        raise BadInputError(f"{path} holds a prompt with other fields than this release knows")
    return Template(prompt, anchors, markers, no_think)


def _fields(template: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}


def read_corpus(clone: Path, name: str) -> CloneCorpus:
    """The corpus of ``configs/corpora/<name>.toml``.

    Raises:
        InputNotFoundError: no such corpus; the message lists those that are there.
        BadInputError: its configuration cannot be used, or it has several files (none that is published has).
    """
    folder = clone.resolve() / "configs" / "corpora"
    path = folder / f"{name}.toml"
    if not path.is_file():
        there = ", ".join(sorted(found.stem for found in folder.glob("*.toml"))) or "none"
        raise InputNotFoundError(f"{clone} has no corpus {name!r}; there are: {there}")
    try:
        config: dict[str, Any] = tomllib.loads(read_text(path))
        files, sample = config["files"], config.get("sample", {})
        source_folder = clone.resolve() / files["directory"]
        matches = sorted(found for found in source_folder.glob(files["glob"]) if found.is_file())
        matches = matches[: files.get("limit")]
        count, seed = int(sample.get("k", 16)), int(sample.get("seed", 42))
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise BadInputError(f"{path} is no corpus configuration: {error!r}") from error
    if len(matches) != 1 or matches[0].suffix not in LANGUAGES or count < 1:
        raise BadInputError(f"{path} must name one JavaScript or Python file and at least one function, not {matches}")
    return CloneCorpus(name, matches[0], LANGUAGES[matches[0].suffix], read_text(matches[0]), count, seed)


def commit_of(clone: Path) -> str | None:
    """The clone's commit; None if it is no git work tree of its own (an unpacked archive, say)."""
    command = ["git", "-C", str(clone), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        top, commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:2]
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
    return commit if Path(top) == clone.resolve() else None
