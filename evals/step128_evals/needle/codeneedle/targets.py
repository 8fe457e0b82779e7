"""The functions that codeneedle asks about: which ones its rules find in a file, and which 16 of them it draws."""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence
from dataclasses import dataclass

from step128_evals.errors import BadInputError
from step128_evals.needle.codeneedle.javascript import javascript_bodies

ASKED_LINES = 20
BONUS_LINES = 40
LANGUAGES = {".js": "js", ".mjs": "js", ".cjs": "js", ".py": "py"}
"""File suffix -> the benchmark's name of the language."""


@dataclass(frozen=True)
class Target:
    """A function with at least :data:`ASKED_LINES` body lines, blank ones counted.

    ``start_line`` is the first body line's number, from 1. ``body`` ends before the closing brace.
    """

    name: str
    start_line: int
    body: tuple[str, ...]

    @property
    def asked(self) -> tuple[str, ...]:
        """The lines that the model is to reproduce."""
        return self.body[:ASKED_LINES]

    @property
    def bonus(self) -> tuple[str, ...]:
        """The lines after them, which it may reproduce too."""
        return self.body[ASKED_LINES : ASKED_LINES + BONUS_LINES]


def find_targets(text: str, language: str, name: str) -> list[Target]:
    """All targets of a source file, in the order in which the benchmark's walk over the syntax tree meets them.

    Of two functions of one name only the first counts. A function that is too short leaves its name to a later one.

    Args:
        text: the file.
        language: ``js`` or ``py``.
        name: the file's name, for errors.

    Raises:
        BadInputError: the file cannot be parsed.
    """
    lines = text.splitlines()  # as the benchmark does: form feeds end a line too
    try:
        bodies = javascript_bodies(text) if language == "js" else _python_bodies(text)
    except (SyntaxError, ValueError) as error:
        raise BadInputError(f"{name} cannot be parsed: {error}") from error
    targets: dict[str, Target] = {}
    for function, first, last in bodies:
        body = tuple(lines[first - 1 : last])
        if len(body) >= ASKED_LINES and function not in targets:
            targets[function] = Target(function, first, body)
    return list(targets.values())


def _python_bodies(text: str) -> list[tuple[str, int, int]]:
    """(name, first body line, last body line) of every function, breadth first."""
    return [
        (node.name, node.body[0].lineno, max(statement.end_lineno or 0 for statement in node.body))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def draw(targets: Sequence[Target], total_lines: int, count: int, seed: int) -> list[Target]:
    """Draw from all parts of the file: one target from each of ``count`` equal stretches, the rest from anywhere.

    Python's own generator, in the benchmark's order of draws, so that the same seed draws the same functions.
    """
    if len(targets) <= count:
        return list(targets)
    generator = random.Random(seed)
    in_order = sorted(targets, key=lambda target: target.start_line)
    stretches: dict[int, list[Target]] = {}
    for target in in_order:
        stretches.setdefault(min(count - 1, target.start_line * count // max(1, total_lines)), []).append(target)
    drawn = [generator.choice(stretches[index]) for index in sorted(stretches)]
    rest = [target for target in in_order if target not in drawn]
    generator.shuffle(rest)
    missing = count - len(drawn)
    return drawn + rest[::-1][:missing]
