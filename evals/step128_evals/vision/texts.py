"""Text in pictures: codes that no model can guess, cells of tables, sentences."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from step128_evals.vision.drawing import GRID, INK, LARGE, LARGEST, SMALL, TILE, WIDE, Canvas, Picture
from step128_evals.vision.item import IN_DIGITS, ONLY, Question

CODE_SIGNS = "ABCDEFGHJKLMNPQRTUVWXYZ2346789"
"""Without those that look alike: 0 and O, 1 and I, 5 and S."""
CITIES = ("Berlin", "Cairo", "Lima", "Oslo", "Paris", "Quito", "Rome", "Seoul", "Tokyo", "Turin")
COLUMNS = ("Price", "Stock", "Weight", "Orders", "Visits", "Returns")
_SUBJECTS = (
    "The old baker",
    "My younger sister",
    "A tired sailor",
    "The new teacher",
    "Our neighbour",
    "The tall guard",
)
_VERBS = ("painted", "repaired", "forgot", "borrowed", "counted", "carried")
_OBJECTS = (
    "seven wooden chairs",
    "the broken clock",
    "two heavy boxes",
    "a green bicycle",
    "the silver keys",
    "nine maps",
)
_PLACES = (
    "behind the station",
    "before breakfast",
    "on the bridge",
    "after the storm",
    "near the river",
    "last winter",
)


def code_questions(random: Random) -> Iterator[Question]:
    """A code of 6 signs, alone on a white picture, from 14 pixels high to 96.

    Small lettering in a large picture is lost to a model that looks at one tile of 728 pixels: there 24 pixels of 2016
    are 9, and 36 pixels of 3024 are 9.
    """
    cases = ((TILE, 14), (SMALL, 20), (TILE, 20), (TILE, 32), (SMALL, 48), (TILE, 96), (WIDE, 24))
    for size, pixels in (*cases, (LARGE, 24), (LARGE, 48), (LARGEST, 36)):
        code = make_code(random)
        text = f"What is the code in this picture? {ONLY.format('the code')}"
        picture = draw_code(size, code, pixels, random)
        yield Question(f"code-{size[0]}-{pixels}px", "code", text, code, "text", (picture,))


def make_code(random: Random) -> str:
    """Six letters and digits, one of each at least."""
    while True:
        code = "".join(random.choices(CODE_SIGNS, k=6))
        if not code.isalpha() and not code.isdigit():
            return code


def draw_code(size: tuple[int, int], code: str, pixels: int, random: Random) -> Picture:
    """The code somewhere on the picture, whole."""
    canvas = Canvas(size)
    half_width, half_height = canvas.text_width(code, pixels) / 2 + pixels, pixels
    x = random.uniform(half_width, canvas.width - half_width)
    y = random.uniform(half_height, canvas.height - half_height)
    canvas.text((round(x), round(y)), code, pixels)
    return canvas.picture()


def table_questions(random: Random) -> Iterator[Question]:
    """A cell by row and column, and a row by its value, of each of three tables."""
    for size, rows, columns in ((SMALL, 4, 3), (TILE, 6, 4), (LARGE, 9, 6)):
        cities, heads = random.sample(CITIES, rows), random.sample(COLUMNS, columns)
        cells = _different_numbers(random, rows, columns)
        picture = _table(size, cities, heads, cells)
        row, column = random.randrange(rows), random.randrange(columns)
        text = f"In this table, what stands in the row {cities[row]} and the column {heads[column]}? {IN_DIGITS}"
        yield Question(f"table-{size[0]}-cell", "table", text, str(cells[row][column]), "number", (picture,))
        row, column = random.randrange(rows), random.randrange(columns)
        text = f"In this table, which row has {cells[row][column]} in the column {heads[column]}?"
        text = f"{text} {ONLY.format('the name of the row')}"
        yield Question(f"table-{size[0]}-row", "table", text, cities[row], "text", (picture,))


def _different_numbers(random: Random, rows: int, columns: int) -> list[list[int]]:
    numbers = random.sample(range(100, 9999), rows * columns)
    return [numbers[row * columns : (row + 1) * columns] for row in range(rows)]


def _table(size: tuple[int, int], cities: list[str], heads: list[str], cells: list[list[int]]) -> Picture:
    canvas = Canvas(size)
    table = [["City", *heads], *([city, *map(str, row)] for city, row in zip(cities, cells, strict=True))]
    margin = 3 * canvas.unit
    width = (canvas.width - 2 * margin) / len(table[0])
    height = (canvas.height - 2 * margin) / len(table)
    pixels = min(height * 0.4, width * 0.2)
    for row, line in enumerate(table):
        for column, text in enumerate(line):
            left, top = margin + column * width, margin + row * height
            outline = INK if row == 0 else GRID
            canvas.draw.rectangle((left, top, left + width, top + height), outline=outline, width=canvas.line)
            canvas.text((left + width / 2, top + height / 2), text, pixels)
    return canvas.picture()


def sentence_questions(random: Random) -> Iterator[Question]:
    """A sentence that makes sense and could not be guessed, on one line or several."""
    cases = ((SMALL, 16, 1), (TILE, 18, 1), (TILE, 40, 3), (WIDE, 22, 1), (LARGE, 30, 2), (LARGE, 90, 3))
    for size, pixels, lines in cases:
        parts = [random.choice(words) for words in (_SUBJECTS, _VERBS, _OBJECTS, _PLACES)]
        sentence = f"{parts[0]} {parts[1]} {parts[2]} {parts[3]}."
        words = sentence.split()
        canvas = Canvas(size)
        share = -(-len(words) // lines)
        for line in range(lines):
            y = canvas.height / 2 + (line - (lines - 1) / 2) * pixels * 1.5
            canvas.text((canvas.width / 2, y), " ".join(words[line * share : (line + 1) * share]), pixels)
        text = f"What is written in this picture? {ONLY.format('the sentence as it stands there, on one line')}"
        id = f"sentence-{size[0]}-{pixels}px"
        yield Question(id, "sentence", text, sentence, "text", (canvas.picture(),))
