"""Build a haystack of a given number of tokens out of Python files, with functions from its first line to its last."""

from __future__ import annotations

from dataclasses import dataclass

from step128_evals.corpus import SourceFile
from step128_evals.errors import BadInputError, EvalError
from step128_evals.files import sha256
from step128_evals.needle.functions import Function, definitions
from step128_evals.needle.segments import Segment, Shelf
from step128_evals.tokens import TokenCounter

_END_SHARE = 0.33  # of the budget, for the first and for the last file; between them is what fills it
_FUNCTION_SHARE = 0.45  # for a single function at an end, where a third is too little for any


@dataclass(frozen=True)
class Placed:
    """A function of a haystack. ``depth``: 0 if it begins with the haystack, 1 if it ends with it, in tokens."""

    function: Function
    depth: float


@dataclass(frozen=True)
class Haystack:
    """``tokens`` counts the whole text. ``placed``: the functions that are whole in it, and whose names are unique."""

    text: str
    tokens: int
    placed: tuple[Placed, ...]

    @property
    def sha256(self) -> str:
        """Of the text."""
        return sha256(self.text)


async def build_haystack(shelf: Shelf, counter: TokenCounter, budget_tokens: int, start: int) -> tuple[Haystack, int]:
    """Take files from the shelf until the budget is full; the same arguments give the same haystack.

    The first part begins with a function, the last one ends with a function, and between them are whole files and, to
    fill the budget to about a line, one part of a file.

    Args:
        shelf: the files.
        counter: counts the whole once more, as tokens may join where parts meet.
        budget_tokens: never exceeded.
        start: position on the shelf.

    Returns:
        The haystack, and the position after the last file that was used.

    Raises:
        BadInputError: the files do not fill it.
        EvalError: the tokenizer counts the whole as far more than the sum of its parts.
    """
    aim = budget_tokens
    for _ in range(4):
        parts, position = await _fill(shelf, aim, start)
        text = "".join(part.text for part in parts)
        tokens = await counter.count(text)
        if tokens <= budget_tokens:
            return Haystack(text, tokens, _placed(shelf, parts, text)), position
        aim -= tokens - budget_tokens + 8
    raise EvalError(f"the server counts {tokens} tokens where the parts make {sum(part.tokens for part in parts)}")


async def _fill(shelf: Shelf, budget_tokens: int, start: int) -> tuple[list[Segment], int]:
    limit = int(_END_SHARE * budget_tokens)
    head = tail = None
    position, turn = start, start // len(shelf)  # when the shelf has gone round, other functions begin and end
    middle: list[Segment] = []
    for position in range(start, start + len(shelf)):
        file = shelf.file(position)
        functions = shelf.functions(file)
        if not functions:
            continue
        if head is None:
            first = functions[turn % len(functions)]
            head = await shelf.longest(file, first.first_line, limit)
            if head is None or head.end_line <= first.last_line:
                head = await _alone(shelf, file, first, budget_tokens)
            continue
        if tail is None:
            last = functions[-1 - turn % len(functions)]
            tail = await shelf.last_functions(file, last, limit) or await _alone(shelf, file, last, budget_tokens)
            continue
        left = budget_tokens - head.tokens - tail.tokens - sum(part.tokens for part in middle)
        end = shelf.line_count(file)
        whole = await shelf.segment(file, 0, end)
        if whole.tokens <= left:
            middle.append(whole)
            continue
        # Which function it begins with depends on the position, so that many haystacks reach all depths.
        part = await shelf.longest(file, functions[position % len(functions)].first_line, left)
        middle += [part] if part else []
        if part is None or part.end_line < end:
            return [head, *middle, tail], position + 1
    if head is None or tail is None:
        raise BadInputError(f"no two functions of the corpus are short enough for a haystack of {budget_tokens} tokens")
    found = head.tokens + tail.tokens + sum(part.tokens for part in middle)
    raise BadInputError(
        f"the corpus is too small for a haystack of {budget_tokens} tokens: its files with functions make {found}. "
        "Take more code, or shorter --lengths."
    )


async def _alone(shelf: Shelf, file: SourceFile, function: Function, budget_tokens: int) -> Segment | None:
    part = await shelf.segment(file, function.first_line, function.last_line + 1)
    return part if part.tokens <= _FUNCTION_SHARE * budget_tokens else None


def _placed(shelf: Shelf, parts: list[Segment], text: str) -> tuple[Placed, ...]:
    total = sum(part.tokens for part in parts)
    often = definitions(text)
    found, before = [], 0
    for part in parts:
        lines = part.text.split("\n")
        ends = [0]
        for line in lines:
            ends.append(ends[-1] + len(line) + 1)
        tokens_per_character = part.tokens / len(part.text)
        for function in shelf.functions(part.file):
            # The heading is the part's line 0.
            first, last = (line - part.first_line + 1 for line in (function.first_line, function.last_line))
            if first < 1 or function.last_line >= part.end_line or often[function.name] != 1:
                continue
            begin = before + ends[first] * tokens_per_character
            length = (ends[last + 1] - ends[first]) * tokens_per_character
            found.append(Placed(function, min(1.0, begin / max(1.0, total - length))))
        before += part.tokens
    return tuple(found)
