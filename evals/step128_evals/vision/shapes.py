"""Shapes on white: how many there are, where they are, which colours they have, and what differs in two pictures."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from step128_evals.vision.drawing import COLOURS, LARGE, SHAPES, SMALL, TILE, WIDE, Canvas, Picture
from step128_evals.vision.item import IN_DIGITS, ONLY, Question
from step128_evals.vision.texts import draw_code, make_code

Scene = dict[tuple[int, int], tuple[str, str]]
"""(row, column) of a grid -> (shape, colour)."""

_SIZES = (SMALL, TILE, WIDE, LARGE)
_CORNERS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
_SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
_PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
}
_COLOUR_NAMES = ", ".join(COLOURS)
_SHAPE_NAMES = ", ".join(SHAPES)


def counting_questions(random: Random) -> Iterator[Question]:
    """Shapes of one kind, or of one colour, among others."""
    for size in _SIZES:
        shape, colour = random.choice(SHAPES), random.choice(list(COLOURS))
        count = random.randint(3, 11)
        cells = _cells(random, count + random.randint(3, 7), 5, 5)
        others = [(s, c) for s in SHAPES for c in COLOURS if s != shape]
        kinds = [(shape, random.choice(list(COLOURS))) for _ in range(count)]
        kinds += [random.choice(others) for _ in cells[count:]]
        text = f"How many of the shapes in this picture are {_PLURALS[shape]}? {IN_DIGITS}"
        picture = _draw(size, dict(zip(cells, kinds, strict=True)), 5, 5, random)
        yield Question(f"count-shape-{size[0]}", "counting", text, str(count), "number", (picture,))

        count = random.randint(3, 11)
        cells = _cells(random, count + random.randint(3, 7), 5, 5)
        kinds = [(random.choice(SHAPES), colour) for _ in range(count)]
        kinds += [(random.choice(SHAPES), random.choice([c for c in COLOURS if c != colour])) for _ in cells[count:]]
        text = f"How many of the shapes in this picture are {colour}? {IN_DIGITS}"
        picture = _draw(size, dict(zip(cells, kinds, strict=True)), 5, 5, random)
        yield Question(f"count-colour-{size[0]}", "counting", text, str(count), "number", (picture,))


def position_questions(random: Random) -> Iterator[Question]:
    """The shape in a corner, and the one beside another."""
    for size in _SIZES:
        corner = random.choice(list(_CORNERS))
        scene = dict(zip(_CORNERS.values(), _different(random, 4), strict=True))
        text = f"Which shape is in the {corner} corner of this picture: {_SHAPE_NAMES}? {ONLY.format('its name')}"
        picture = _draw(size, scene, 2, 2, random)
        yield Question(f"corner-{size[0]}", "position", text, scene[_CORNERS[corner]][0], "text", (picture,))

        side = random.choice(list(_SIDES))
        kinds = _different(random, 5)
        down, across = _SIDES[side]
        scene = dict(zip([(1, 1), *((1 + d, 1 + a) for d, a in _SIDES.values())], kinds, strict=True))
        shape, colour = kinds[0]
        text = f"Which shape is directly {side} the {colour} {shape} in the middle: {_SHAPE_NAMES}?"
        picture = _draw(size, scene, 3, 3, random)
        answer = scene[(1 + down, 1 + across)][0]
        text = f"{text} {ONLY.format('its name')}"
        yield Question(f"beside-{size[0]}", "position", text, answer, "text", (picture,))


def colour_questions(random: Random) -> Iterator[Question]:
    """The colour of the only shape of its kind."""
    for number, size in enumerate((*_SIZES, TILE, LARGE)):
        kinds = _different(random, 4)
        scene = dict(zip(_cells(random, 4, 3, 3), kinds, strict=True))
        shape, colour = random.choice(kinds)
        text = f"What colour is the {shape} in this picture: {_COLOUR_NAMES}? {ONLY.format('the colour')}"
        picture = _draw(size, scene, 3, 3, random)
        yield Question(f"colour-{size[0]}-{number}", "colour", text, colour, "text", (picture,))


def pair_questions(random: Random) -> Iterator[Question]:
    """Two pictures in one request: the code of one of them, and the one shape that is not the same."""
    for size in _SIZES:
        codes = (make_code(random), make_code(random))
        wanted = random.randrange(2)
        pictures = tuple(draw_code(size, code, 48, random) for code in codes)
        text = f"What is the code in the {('first', 'second')[wanted]} of the two pictures? {ONLY.format('the code')}"
        yield Question(f"pair-code-{size[0]}", "two pictures", text, codes[wanted], "text", pictures)

        cells = _cells(random, 6, 3, 3)
        scene = {cell: (random.choice(SHAPES), random.choice(list(COLOURS))) for cell in cells}
        changed = random.choice(cells)
        shape, colour = scene[changed]
        new = random.choice([name for name in COLOURS if name != colour])
        seed = random.random()
        # The same seed twice: the shapes of both pictures stand in the same places.
        both = [_draw(size, s, 3, 3, Random(seed)) for s in (scene, {**scene, changed: (shape, new)})]
        text = (
            "The two pictures are the same, but for the colour of one shape. What colour is that shape in the second "
            f"picture: {_COLOUR_NAMES}? {ONLY.format('the colour')}"
        )
        yield Question(f"pair-change-{size[0]}", "two pictures", text, new, "text", tuple(both))


def _cells(random: Random, count: int, rows: int, columns: int) -> list[tuple[int, int]]:
    return random.sample([(row, column) for row in range(rows) for column in range(columns)], count)


def _different(random: Random, count: int) -> list[tuple[str, str]]:
    """Shapes and colours of which none comes twice."""
    return list(zip(random.sample(SHAPES, count), random.sample(list(COLOURS), count), strict=True))


def _draw(size: tuple[int, int], scene: Scene, rows: int, columns: int, random: Random) -> Picture:
    """Each shape somewhere in its cell of the grid, none touching another."""
    canvas = Canvas(size)
    width, height = canvas.width / columns, canvas.height / rows
    radius = min(width, height) * 0.3
    for (row, column), (shape, colour) in scene.items():
        shift = [random.uniform(-0.5, 0.5) * (length - 2.4 * radius) for length in (width, height)]
        centre = ((column + 0.5) * width + min(max(shift[0], -radius), radius), (row + 0.5) * height + shift[1])
        canvas.shape(shape, centre, radius, colour)
    return canvas.picture()
