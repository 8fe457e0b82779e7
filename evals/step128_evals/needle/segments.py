"""Parts of Python files, each counted once by the server's tokenizer: what haystacks are put together from."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

from step128_evals.corpus import Corpus, SourceFile
from step128_evals.needle.functions import Function, find_functions
from step128_evals.needle.question import heading
from step128_evals.tokens import TokenCounter


@dataclass(frozen=True)
class Segment:
    """Lines of a file, from ``first_line`` to before ``end_line`` (from 0), and the tokens of them with the heading."""

    file: SourceFile
    first_line: int
    end_line: int
    tokens: int

    @cached_property
    def text(self) -> str:
        """The heading and the lines."""
        return segment_text(self.file, self.first_line, self.end_line)


def segment_text(file: SourceFile, first_line: int, end_line: int) -> str:
    """The heading and the lines of a part, and an empty line after it."""
    lines = file.text.removesuffix("\n").split("\n")[first_line:end_line]
    return heading(file.name, first_line + 1, first_line + len(lines)) + "\n".join(lines) + "\n\n"


class Shelf:
    """The files of a corpus that hold functions, in an order that the seed decides, and their counted parts."""

    def __init__(self, corpus: Corpus, counter: TokenCounter, lines_asked: int, seed: int) -> None:
        self._files = list(corpus.files)
        random.Random(seed).shuffle(self._files)
        self._counter = counter
        self._lines_asked = lines_asked
        self._functions: dict[str, list[Function]] = {}
        self._counts: dict[tuple[str, int, int], int] = {}

    def __len__(self) -> int:
        return len(self._files)

    def file(self, position: int) -> SourceFile:
        """The file at a position of the order, which goes round."""
        return self._files[position % len(self._files)]

    def line_count(self, file: SourceFile) -> int:
        """Lines of a file."""
        return file.text.removesuffix("\n").count("\n") + 1

    def functions(self, file: SourceFile) -> list[Function]:
        """Those that can be asked about, in the file's order."""
        if file.name not in self._functions:
            self._functions[file.name] = find_functions(file, self._lines_asked)
        return self._functions[file.name]

    async def segment(self, file: SourceFile, first_line: int, end_line: int) -> Segment:
        """A part of a file, counted (once)."""
        key = file.name, first_line, end_line
        if key not in self._counts:
            self._counts[key] = await self._counter.count(segment_text(file, first_line, end_line))
        return Segment(file, first_line, end_line, self._counts[key])

    async def longest(self, file: SourceFile, first_line: int, limit_tokens: int) -> Segment | None:
        """The longest part from a line on within a limit; None if not even one line fits.

        It is found in about ten requests, all about this one file and never about a haystack.
        """
        best = None
        low, high = first_line + 1, min(self.line_count(file), first_line + limit_tokens)  # a line is at least a token
        while low <= high:
            middle = (low + high) // 2
            part = await self.segment(file, first_line, middle)
            if part.tokens <= limit_tokens:
                best, low = part, middle + 1
            else:
                high = middle - 1
        return best

    async def last_functions(self, file: SourceFile, last: Function, limit_tokens: int) -> Segment | None:
        """The longest part within a limit that ends with a function; None if even that alone is too long.

        It begins at a function, or at the file's beginning.
        """
        starts = [function.first_line for function in self.functions(file) if function.first_line <= last.first_line]
        starts = [0, *starts]
        end = last.last_line + 1
        best = None
        low, high = 0, len(starts) - 1
        while low <= high:
            middle = (low + high) // 2
            part = await self.segment(file, starts[middle], end)
            if part.tokens <= limit_tokens:
                best, high = part, middle - 1
            else:
                low = middle + 1
        return best
