"""Score one answer line by line: exactly, and beside that with whitespace at line ends, or at both ends, forgiven."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from step128_evals.chat import split_reasoning

NORMALIZATIONS: dict[str, Callable[[str], str]] = {"exact": str, "rstrip": str.rstrip, "strip": str.strip}
"""Name -> what both sides' lines go through. Only ``exact`` decides whether an item passes."""

_FENCE = "```"
_THOUGHT_BEGIN = "<think>"


@dataclass(frozen=True)
class LineScore:
    """``passed``: every asked line, in order and with nothing but blank lines between. ``lines``: how many came."""

    passed: bool
    lines: int


def answer_lines(content: str) -> list[str]:
    """The lines of an answer that are not blank: of its code fences if it has any (an open one ends with the answer).

    Reasoning that a server left in the content goes, also when it was cut before its end. All line endings are taken
    for one, and nothing else is changed.
    """
    _, content = split_reasoning(content)
    if content.lstrip().startswith(_THOUGHT_BEGIN):
        return []
    lines = content.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    inside, fenced, seen = False, [], False
    for line in lines:
        if line.lstrip().startswith(_FENCE):
            inside, seen = not inside, True
        elif inside:
            fenced.append(line)
    return [line for line in (fenced if seen else lines) if line.strip()]


def score_lines(asked: Sequence[str], said: Sequence[str]) -> dict[str, LineScore]:
    """Compare under each of :data:`NORMALIZATIONS`.

    Lines before and after the asked ones do not fail an item: a repeated signature, or a body that goes on, is no
    failure of recall. A line in between does.

    Args:
        asked: without blank lines.
        said: from :func:`answer_lines`.
    """
    return {name: _score([normal(a) for a in asked], [normal(s) for s in said]) for name, normal in _ITEMS}


_ITEMS = tuple(NORMALIZATIONS.items())


def _score(asked: list[str], said: list[str]) -> LineScore:
    starts = range(len(said) - len(asked) + 1)
    if any(said[start : start + len(asked)] == asked for start in starts):
        return LineScore(True, len(asked))
    blocks = SequenceMatcher(None, asked, said, autojunk=False).get_matching_blocks()
    return LineScore(False, sum(block.size for block in blocks))


def invented_lines(body: Sequence[str], signature: str, said: Sequence[str]) -> int:
    """Lines of the answer that are, indentation aside, no line of the function at all."""
    known = {line.strip() for line in (*body, *signature.split("\n"))}
    return sum(line.strip() not in known for line in said)
