"""codeneedle's scoring of one answer: matched, invented and bonus lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

PASS_LINES = 8
"""Of the 20 asked lines, so many must be matched."""

_FENCE = "```"


@dataclass(frozen=True)
class LineCounts:
    """``matched`` of ``asked`` lines; ``bonus``: right lines beyond them; ``hallucinated``: lines that are neither."""

    matched: int
    asked: int
    hallucinated: int
    bonus: int

    @property
    def passed(self) -> bool:
        """By the benchmark's threshold."""
        return self.matched >= PASS_LINES


def strict(line: str) -> str:
    """The benchmark's default: whitespace at the end of a line does not count."""
    return line.rstrip()


def relaxed(line: str) -> str:
    """Its ``--relax-indent``: indentation does not count either."""
    return line.strip()


def count_lines(asked: Sequence[str], bonus: Sequence[str], answer: str, normal: Callable[[str], str]) -> LineCounts:
    """Align an answer with a function's body by difflib's matching blocks (which need not be the longest alignment).

    Args:
        asked: the lines that should come.
        bonus: the lines after those.
        answer: as the model gave it.
        normal: :func:`strict` or :func:`relaxed`.
    """
    expected = [normal(line) for line in (*asked, *bonus)]
    said = [normal(line) for line in _answer_lines(answer)]
    blocks = SequenceMatcher(None, expected, said, autojunk=False).get_matching_blocks()
    places = [block.a + offset for block in blocks for offset in range(block.size)]
    explained = {block.b + offset for block in blocks for offset in range(block.size)}
    matched = sum(place < len(asked) for place in places)
    # Blank lines are never held against the model.
    hallucinated = sum(bool(line.strip()) for place, line in enumerate(said) if place not in explained)
    return LineCounts(matched, len(asked), hallucinated, len(places) - matched)


def _answer_lines(answer: str) -> list[str]:
    """What stands between the first and the last code fence; with fewer than two fences, all but the fence."""
    lines = answer.splitlines()
    fences = [place for place, line in enumerate(lines) if line.lstrip().startswith(_FENCE)]
    if len(fences) > 1:
        lines = lines[fences[0] + 1 : fences[-1]]
    elif fences:
        del lines[fences[0]]
    filled = [place for place, line in enumerate(lines) if line.strip()]
    return lines[filled[0] : filled[-1] + 1] if filled else []
