"""A white canvas in pixels, its colours and its lettering, the same on every machine with the same Pillow."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 150, 50),
    "blue": (40, 80, 225),
    "yellow": (245, 205, 0),
    "orange": (245, 130, 20),
    "purple": (140, 40, 170),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
INK = COLOURS["black"]
GRID = (205, 205, 205)

SMALL, TILE, WIDE, LARGE = (448, 336), (728, 728), (1512, 756), (2016, 1512)
"""Widths and heights in pixels. Step-3.7 looks at 728 x 728; what is larger it cuts into crops of 504 pixels as well
(the processor in vLLM 0.32), so TILE is the largest picture that is one tile, and LARGE is 4 x 3 crops."""
LARGEST = (3024, 3024)
"""36 crops, the most that the processor makes."""


@dataclass(frozen=True)
class Picture:
    """``sha256`` is of the pixels (RGB, row by row), so it does not depend on how zlib packs the PNG."""

    png: bytes
    sha256: str
    width: int
    height: int


class Canvas:
    """White; lengths are pixels, ``unit`` is 1/100 of the shorter side."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.image = Image.new("RGB", size, "white")
        self.draw = ImageDraw.Draw(self.image)
        self.width, self.height = size
        self.unit = min(size) / 100

    @property
    def line(self) -> int:
        """A width for lines."""
        return max(1, round(self.unit * 0.5))

    def text(self, at: tuple[float, float], text: str, pixels: float, anchor: str = "mm", fill: Any = INK) -> None:
        """Write one line; ``anchor`` as Pillow has it, ``pixels`` is the size of the font."""
        self.draw.text(at, text, fill=fill, font=_font(round(pixels)), anchor=anchor)

    def text_width(self, text: str, pixels: float) -> float:
        """How wide one line would be."""
        return float(self.draw.textlength(text, font=_font(round(pixels))))

    def shape(self, name: str, centre: tuple[float, float], radius: float, colour: str) -> None:
        """One of :data:`SHAPES`, inside a circle of that radius."""
        x, y = centre
        fill = COLOURS[colour]
        if name == "circle":
            self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        elif name == "square":
            half = radius * 0.7
            self.draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
        elif name == "triangle":
            self.draw.polygon(_corners(x, y, [radius] * 3), fill=fill)
        elif name == "star":
            self.draw.polygon(_corners(x, y, [radius, radius * 0.42] * 5), fill=fill)
        else:
            arm = radius * 0.3
            self.draw.rectangle((x - radius * 0.9, y - arm, x + radius * 0.9, y + arm), fill=fill)
            self.draw.rectangle((x - arm, y - radius * 0.9, x + arm, y + radius * 0.9), fill=fill)

    def picture(self) -> Picture:
        """What was drawn so far."""
        stream = io.BytesIO()
        self.image.save(stream, "PNG", compress_level=6)
        digest = hashlib.sha256(f"{self.width}x{self.height}\n".encode() + self.image.tobytes()).hexdigest()
        return Picture(stream.getvalue(), digest, self.width, self.height)


def _corners(x: float, y: float, radii: Sequence[float]) -> list[tuple[float, float]]:
    """Corners at equal angles, the first one on top."""
    step = 2 * math.pi / len(radii)
    return [(x + r * math.sin(i * step), y - r * math.cos(i * step)) for i, r in enumerate(radii)]


@lru_cache
def _font(pixels: int) -> Any:
    """Pillow's built-in typeface (Aileron), laid out without the system's libraries: needs no font file."""
    return ImageFont.load_default(size=pixels)
