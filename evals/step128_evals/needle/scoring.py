"""Score one answer line by line: exactly, and beside that with whitespace at line ends, or at both ends, forgiven.

An answer is its last code block, or all of it if it has none. An item passes if the asked lines stand in it in order,
with nothing but blank lines between them, and if it has nothing else in it than this one function has: a repeated
signature or a body that goes on is no failure of recall, but who writes down more, the whole context say, has not found
the function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from step128_evals.chat import split_reasoning

NORMALIZATIONS: dict[str, Callable[[str], str]] = {"exact": str, "rstrip": str.rstrip, "strip": str.strip}
"""Name -> what both sides' lines go through. Only ``exact`` decides whether an item passes."""

SCORING_VERSION = 2
"""Counts up when an answer's score may change, so that no run is resumed under another scoring."""

_FENCES = ("```", "~~~")
_THOUGHT_BEGIN = "<think>"


@dataclass(frozen=True)
class LineScore:
    """``passed``: as the module says. ``lines``: how many of the asked lines came, in order."""

    passed: bool
    lines: int


def answer_lines(content: str) -> list[str]:
    """The lines that are not blank of an answer's last code block (one that is open ends with the answer).

    Blocks with no such line do not count; an answer without any block is taken whole. Reasoning that a server left in
    the content goes, also when it was cut before its end. All line endings are taken for one, and nothing else is
    changed.
    """
    _, content = split_reasoning(content)
    if content.lstrip().startswith(_THOUGHT_BEGIN):
        return []
    lines = content.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    inside = False
    blocks: list[list[str]] = []
    for line in lines:
        if line.lstrip().startswith(_FENCES):
            inside = not inside
            blocks += [[]] if inside else []
        elif inside and line.strip():
            blocks[-1].append(line)
    if blocks:
        return next((block for block in reversed(blocks) if block), [])
    return [line for line in lines if line.strip()]


def score_lines(asked: Sequence[str], said: Sequence[str], invented: int) -> dict[str, LineScore]:
    """Compare under each of :data:`NORMALIZATIONS`.

    Args:
        asked: without blank lines.
        said: from :func:`answer_lines`.
        invented: from :func:`invented_lines`; with any, no item passes.
    """
    return {name: _score([normal(a) for a in asked], [normal(s) for s in said], invented) for name, normal in _ITEMS}


_ITEMS = tuple(NORMALIZATIONS.items())


def _score(asked: list[str], said: list[str], invented: int) -> LineScore:
    starts = range(len(said) - len(asked) + 1)
    if any(said[start : start + len(asked)] == asked for start in starts):
        return LineScore(invented == 0, len(asked))
    blocks = SequenceMatcher(None, asked, said, autojunk=False).get_matching_blocks()
    return LineScore(False, sum(block.size for block in blocks))


def invented_lines(function: Sequence[str], said: Sequence[str]) -> int:
    """Lines of the answer that are, indentation aside, none of the function's, or come more often than in it.

    Args:
        function: all its lines, signature and decorators included.
        said: from :func:`answer_lines`.
    """
    more = Counter(line.strip() for line in said) - Counter(line.strip() for line in function)
    return more.total()
