"""One question about one or two pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from step128_evals.vision.drawing import Picture

Kind = Literal["number", "text"]
IN_DIGITS = "Answer with only the number, in digits."
ONLY = "Answer with only {}, without any other words."


@dataclass(frozen=True)
class Question:
    """``text`` ends by saying what form the answer must have. ``answer`` is exact: computed from what was drawn.
    ``kind``: numbers are compared as numbers, texts letter by letter (see :mod:`.answers`)."""

    id: str
    category: str
    text: str
    answer: str
    kind: Kind
    pictures: tuple[Picture, ...]

    @property
    def largest_side(self) -> int:
        """Of all its pictures, in pixels."""
        return max(max(picture.width, picture.height) for picture in self.pictures)
