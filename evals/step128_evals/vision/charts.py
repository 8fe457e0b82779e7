"""Bar, line and pie charts. Every value can be read exactly: it is written beside its mark, or lies on a grid line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

from step128_evals.vision.drawing import COLOURS, GRID, INK, LARGE, SMALL, TILE, WIDE, Canvas, Picture
from step128_evals.vision.item import IN_DIGITS, ONLY, Question

FRUIT = ("Apple", "Cherry", "Fig", "Grape", "Kiwi", "Lemon", "Mango", "Olive", "Peach", "Plum")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
GRID_LINES = 10
"""Above the base line."""


def bar_questions(random: Random) -> Iterator[Question]:
    """Three questions about each of four bar charts: two with values written on the bars, two with a grid."""
    for size, labelled in ((SMALL, True), (TILE, False), (WIDE, True), (LARGE, False)):
        names = random.sample(FRUIT, random.randint(4, 5 if size == TILE else 8))  # six names may touch there
        step = random.choice((5, 20, 50))
        values = _values(random, len(names), step, labelled)
        picture = _bars(size, names, values, step, labelled)
        asked = random.choice(names)
        highest = names[values.index(max(values))]
        texts = (
            (f"What is the value of the bar {asked} in this chart?", "number", str(values[names.index(asked)])),
            ("Which bar of this chart is the highest?", "text", highest),
            ("How many bars does this chart have?", "number", str(len(names))),
        )
        yield from _questions("bar chart", f"bar-{size[0]}", picture, texts, "its name")


def line_questions(random: Random) -> Iterator[Question]:
    """Three questions about each of three line charts with a grid."""
    for size in (SMALL, TILE, LARGE):
        start, count = random.randint(0, 3), random.randint(6, 8)
        months = MONTHS[start : start + count]
        step = random.choice((5, 20, 50))
        values = _values(random, count, step, labelled=False)
        picture = _line(size, months, values, step)
        asked = random.choice(months)
        lowest = months[values.index(min(values))]
        texts = (
            (f"What is the value in {asked} in this chart?", "number", str(values[months.index(asked)])),
            ("In which month is the value in this chart the lowest?", "text", lowest),
            ("How many months does this chart show?", "number", str(count)),
        )
        yield from _questions("line chart", f"line-{size[0]}", picture, texts, "the month as it is written there")


def pie_questions(random: Random) -> Iterator[Question]:
    """Three questions about each of three pie charts with names beside and shares on the slices."""
    for size, slices in zip((SMALL, TILE, LARGE), random.sample((4, 5, 6), 3), strict=True):
        names = random.sample(FRUIT, slices)
        shares = _shares(random, len(names))
        picture = _pie(size, names, shares)
        asked = random.choice(names)
        largest = names[shares.index(max(shares))]
        texts = (
            (f"How many percent does {asked} have in this chart?", "number", str(shares[names.index(asked)])),
            ("Which slice of this chart is the largest?", "text", largest),
            ("How many slices does this chart have?", "number", str(len(names))),
        )
        yield from _questions("pie chart", f"pie-{size[0]}", picture, texts, "its name")


def _questions(
    category: str, id: str, picture: Picture, texts: tuple[tuple[str, str, str], ...], name: str
) -> Iterator[Question]:
    for place, (text, kind, answer) in enumerate(texts, start=1):
        if kind == "number":
            yield Question(f"{id}-{place}", category, f"{text} {IN_DIGITS}", answer, "number", (picture,))
        else:
            yield Question(f"{id}-{place}", category, f"{text} {ONLY.format(name)}", answer, "text", (picture,))


def _values(random: Random, count: int, step: int, labelled: bool) -> list[int]:
    """Different from each other; on the grid, or anywhere up to its top."""
    if not labelled:
        return [step * place for place in random.sample(range(1, GRID_LINES + 1), count)]
    places = random.sample(range(2, GRID_LINES * 2), count)  # half a grid line apart at least, to tell heights apart
    return [step * place // 2 + random.randint(0, step // 5) for place in places]


def _shares(random: Random, count: int) -> list[int]:
    """Percent that sum to 100, at least 6 each, the largest at least 5 ahead."""
    while True:
        cuts = sorted(random.sample(range(1, 100), count - 1))
        shares = [high - low for low, high in zip([0, *cuts], [*cuts, 100], strict=True)]
        first, second = sorted(shares, reverse=True)[:2]
        if min(shares) >= 6 and first - second >= 5:
            return shares


class _Axes:
    """A grid with its values at the left; maps values to heights and columns to their middles."""

    def __init__(self, canvas: Canvas, columns: int, step: int) -> None:
        unit = canvas.unit
        self.left, self.right = 14 * unit, canvas.width - 4 * unit
        self.top, self.bottom = 8 * unit, canvas.height - 11 * unit
        self.columns, self.step = columns, step
        for place in range(GRID_LINES + 1):
            y = self.y(place * step)
            canvas.draw.line((self.left, y, self.right, y), fill=GRID if place else INK, width=canvas.line)
            canvas.text((self.left - 1.5 * unit, y), str(place * step), 4.4 * unit, "rm")
        canvas.draw.line((self.left, self.top, self.left, self.bottom), fill=INK, width=canvas.line)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * value / (self.step * GRID_LINES)

    def x(self, column: int) -> float:
        return self.left + (self.right - self.left) * (column + 0.5) / self.columns


def _bars(size: tuple[int, int], names: list[str], values: list[int], step: int, labelled: bool) -> Picture:
    canvas = Canvas(size)
    axes = _Axes(canvas, len(names), step)
    half = (axes.right - axes.left) / len(names) * 0.32
    for column, (name, value) in enumerate(zip(names, values, strict=True)):
        x, y = axes.x(column), axes.y(value)
        canvas.draw.rectangle((x - half, y, x + half, axes.bottom), fill=COLOURS["blue"])
        canvas.text((x, axes.bottom + 4.5 * canvas.unit), name, 4.4 * canvas.unit)
        if labelled:
            canvas.text((x, y - 3 * canvas.unit), str(value), 4.4 * canvas.unit)
    return canvas.picture()


def _line(size: tuple[int, int], months: tuple[str, ...], values: list[int], step: int) -> Picture:
    canvas = Canvas(size)
    axes = _Axes(canvas, len(months), step)
    points = [(axes.x(column), axes.y(value)) for column, value in enumerate(values)]
    canvas.draw.line(points, fill=COLOURS["red"], width=canvas.line * 2)
    for (x, y), month in zip(points, months, strict=True):
        canvas.shape("circle", (x, y), 1.4 * canvas.unit, "red")
        canvas.text((x, axes.bottom + 4.5 * canvas.unit), month, 4.4 * canvas.unit)
    return canvas.picture()


def _pie(size: tuple[int, int], names: list[str], shares: list[int]) -> Picture:
    canvas = Canvas(size)
    x, y, radius = canvas.width / 2, canvas.height / 2, 30 * canvas.unit
    done = 0
    for (name, share), colour in zip(zip(names, shares, strict=True), COLOURS, strict=False):
        start, end = (done * 3.6 - 90, (done + share) * 3.6 - 90)
        fill = COLOURS[colour]
        canvas.draw.pieslice((x - radius, y - radius, x + radius, y + radius), start, end, fill=fill, outline="white")
        angle = math.radians((start + end) / 2)
        across, down = math.cos(angle), math.sin(angle)
        light = "black" if colour == "yellow" else "white"
        canvas.text((x + across * radius * 0.72, y + down * radius * 0.72), f"{share} %", 4 * canvas.unit, fill=light)
        side = "lm" if across > 0.3 else "rm" if across < -0.3 else "mm"
        canvas.text((x + across * radius * 1.1, y + down * radius * 1.14), name, 4.6 * canvas.unit, side)
        done += share
    return canvas.picture()
