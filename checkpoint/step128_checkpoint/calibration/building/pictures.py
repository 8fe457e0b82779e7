"""Drawn pictures with questions whose answers follow from the drawing: charts, pages of text, scenes, tables.

They are no photographs: charts, screens and documents are what people show a language model most, and they can be made
anywhere. For photographs add a part with a folder or a dataset.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

from PIL import Image, ImageDraw, ImageFont

from step128_checkpoint.calibration.building.conversations import assistant
from step128_checkpoint.calibration.building.documents import Document, Message
from step128_checkpoint.calibration.building.words import (
    CITIES,
    COLOURS,
    GIVEN_NAMES,
    MONTHS,
    PRODUCTS,
    TOPICS,
    date,
    listed,
    person,
)

_SIZES = ((640, 480), (480, 640), (728, 728), (600, 400), (900, 600), (320, 240), (1000, 420), (512, 512))
_SHAPES = ("circle", "square", "triangle", "star")
_Colour = tuple[int, int, int]
_WHITE, _BLACK = (255, 255, 255), (20, 20, 20)


@dataclass(frozen=True)
class Picture:
    """A drawn picture, what it shows in a sentence, and questions with answers about it."""

    image: Image.Image
    caption: str
    questions: tuple[tuple[str, str], ...]


def single_pictures(rng: random.Random) -> Iterator[Document]:
    """One picture a conversation, without end."""
    for number in count(1):
        picture = draw_picture(rng)
        asked = [*rng.sample(picture.questions, min(len(picture.questions), rng.randint(1, 2)))]
        if rng.random() < 0.4:
            what = ("What does this picture show?", "Describe this image.", "what is this")
            asked.insert(0, (rng.choice(what), picture.caption))
        turns: list[Message] = []
        for i, (question, answer) in enumerate(asked):
            content: list[Message] = [{"type": "text", "text": question}]
            if i == 0:
                content.insert(0 if rng.random() < 0.8 else 1, {"type": "image"})
            turns.append({"role": "user", "content": content if i == 0 else question})
            turns.append(assistant(answer, f"I look at the picture. {picture.caption}" if rng.random() < 0.6 else ""))
        yield Document(f"picture {number}", messages=tuple(turns), images=(picture.image,))


def several_pictures(rng: random.Random) -> Iterator[Document]:
    """Two to four small pictures a conversation, compared or told apart, without end."""
    for number in count(1):
        drawn = [draw_picture(rng, small=True) for _ in range(rng.randint(2, 4))]
        content: list[Message] = []
        labelled = rng.random() < 0.5
        for i, _ in enumerate(drawn, start=1):
            content += [{"type": "text", "text": f"Picture {i}:"}] * labelled + [{"type": "image"}]
        chosen = rng.randrange(len(drawn))
        question, answer = rng.choice(drawn[chosen].questions)
        if rng.random() < 0.5:
            asked = f"About picture {chosen + 1}: {question}"
        else:
            asked = "Describe each picture in one sentence."
            answer = "\n".join(f"{i}. {picture.caption}" for i, picture in enumerate(drawn, start=1))
        content.append({"type": "text", "text": asked})
        reasoning = f"There are {len(drawn)} pictures." + f" The question is about number {chosen + 1}." * (
            "About" in asked
        )
        turns = ({"role": "user", "content": content}, assistant(answer, reasoning))
        yield Document(f"pictures {number}", messages=turns, images=tuple(picture.image for picture in drawn))


def draw_picture(rng: random.Random, small: bool = False) -> Picture:
    """A picture of any kind; ``small`` ones fit several into one sample."""
    makers: tuple[Callable[[random.Random, tuple[int, int]], Picture], ...] = (
        _bars,
        _lines,
        _pie,
        _page,
        _table,
        _scene,
    )
    size = rng.choice(((320, 240), (240, 320), (360, 360), (400, 300)) if small else _SIZES)
    return rng.choice(makers)(rng, size)


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(9, size))


def _canvas(rng: random.Random, size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw, _Colour]:
    """An image, its pen, and the colour to write with: dark on light, sometimes light on dark."""
    dark = rng.random() < 0.25
    shade = rng.randrange(16)
    ground = (24 + shade, 26 + shade, 30 + shade) if dark else (255 - shade, 255 - shade, 255 - shade // 2)
    image = Image.new("RGB", size, ground)
    return image, ImageDraw.Draw(image), _WHITE if dark else _BLACK


def _series(rng: random.Random) -> tuple[str, list[str], list[int]]:
    """Title, labels and values of a chart, all values different."""
    what = rng.choice(("Visitors", "Sales", "Rainfall (mm)", "Tickets closed", "Energy (kWh)", "Orders"))
    labels = rng.choice(
        (
            [month[:3] for month in MONTHS[: rng.randint(4, 7)]],
            rng.sample([city for city in CITIES if len(city) < 8], rng.randint(4, 6)),
            [str(year) for year in range(2020, 2020 + rng.randint(4, 7))],
        )
    )
    return what, labels, rng.sample(range(5, 100), len(labels))


def _chart_questions(what: str, labels: list[str], values: list[int]) -> tuple[tuple[str, str], ...]:
    most, least = labels[values.index(max(values))], labels[values.index(min(values))]
    return (
        (f"Which has the highest value of {what}?", f"{most}, with {max(values)}."),
        (
            f"Which is lowest, and how far is it below {most}?",
            f"{least}: {min(values)}, {max(values) - min(values)} less.",
        ),
        ("List all values.", ", ".join(f"{label}: {value}" for label, value in zip(labels, values, strict=True))),
    )


def _frame(
    pen: ImageDraw.ImageDraw, ink: _Colour, size: tuple[int, int], what: str
) -> tuple[float, float, float, float, float]:
    """Title and axes; returns left, top, right and bottom of the plot, and the size of its writing."""
    width, height = size
    text = height / 24
    left, top, right, bottom = width * 0.1, height * 0.16, width * 0.96, height * 0.86
    pen.text((width / 2, height * 0.07), what, ink, _font(text * 1.4), anchor="mm")
    pen.line((left, top, left, bottom, right, bottom), ink, 2)
    for value in (0, 25, 50, 75, 100):
        y = bottom - (bottom - top) * value / 100
        pen.line((left - 4, y, left, y), ink, 1)
        pen.text((left - 6, y), str(value), ink, _font(text * 0.8), anchor="rm")
    return left, top, right, bottom, text


def _bars(rng: random.Random, size: tuple[int, int]) -> Picture:
    image, pen, ink = _canvas(rng, size)
    what, labels, values = _series(rng)
    left, top, right, bottom, text = _frame(pen, ink, size, what)
    colours = (
        [rng.choice(COLOURS)[1]] * len(labels)
        if rng.random() < 0.5
        else [c for _, c in rng.sample(COLOURS, len(labels))]
    )
    step = (right - left) / len(labels)
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        x, y = left + step * i, bottom - (bottom - top) * value / 100
        pen.rectangle((x + step * 0.2, y, x + step * 0.8, bottom), colours[i])
        pen.text((x + step / 2, y - 2), str(value), ink, _font(text * 0.9), anchor="mb")
        pen.text((x + step / 2, bottom + 4), label, ink, _font(text * 0.9), anchor="mt")
    caption = f"A bar chart titled {what} with {len(labels)} bars: {listed(labels)}."
    return Picture(image, caption, _chart_questions(what, labels, values))


def _lines(rng: random.Random, size: tuple[int, int]) -> Picture:
    image, pen, ink = _canvas(rng, size)
    what, labels, values = _series(rng)
    left, top, right, bottom, text = _frame(pen, ink, size, what)
    name, colour = rng.choice(COLOURS)
    step = (right - left) / len(labels)
    points = [(left + step * (i + 0.5), bottom - (bottom - top) * value / 100) for i, value in enumerate(values)]
    pen.line(points, colour, 3)
    for (x, y), label, value in zip(points, labels, values, strict=True):
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        pen.text((x, y - 7), str(value), ink, _font(text * 0.9), anchor="mb")
        pen.text((x, bottom + 4), label, ink, _font(text * 0.9), anchor="mt")
    caption = f"A line chart titled {what}: a {name} line over {listed(labels)}."
    return Picture(image, caption, _chart_questions(what, labels, values))


def _pie(rng: random.Random, size: tuple[int, int]) -> Picture:
    image, pen, ink = _canvas(rng, size)
    what, labels, values = _series(rng)
    colours = rng.sample(COLOURS, len(labels))
    width, height = size
    radius = min(width * 0.27, height * 0.38)
    middle, legend = (radius * 1.15, height * 0.54), radius * 2.4
    start, text = 0.0, min(height / 24, width / 22)
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        end = start + 360 * value / sum(values)
        box = (middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius)
        pen.pieslice(box, start, end, colours[i][1])
        y = height * 0.2 + i * text * 1.8
        pen.rectangle((legend, y - text / 2, legend + text, y + text / 2), colours[i][1])
        pen.text((legend + text * 1.4, y), f"{label} {value}", ink, _font(text), anchor="lm")
        start = end
    pen.text((width / 2, height * 0.05), what, ink, _font(text * 1.3), anchor="mm")
    share = round(100 * max(values) / sum(values))
    most = labels[values.index(max(values))]
    extra = (
        (f"Which share does {most} have?", f"{max(values)} of {sum(values)}, about {share} %."),
        ("Which colour is the largest slice?", f"{colours[values.index(max(values))][0].capitalize()} ({most})."),
    )
    caption = f"A pie chart titled {what} with {len(labels)} slices: {listed(labels)}."
    return Picture(image, caption, _chart_questions(what, labels, values)[:1] + extra)


def _page(rng: random.Random, size: tuple[int, int]) -> Picture:
    """A letter or notice: text to be read."""
    image, pen, ink = _canvas(rng, size)
    sender, receiver, topic, when = person(rng), person(rng), rng.choice(TOPICS), date(rng)
    amount, number = rng.randrange(20, 9000), rng.randrange(1000, 99999)
    kind = rng.choice(("INVOICE", "NOTICE", "MEMO"))
    lines = {
        "INVOICE": [f"Number {number}", f"To: {receiver}", f"For: {rng.choice(PRODUCTS)}", f"Total: {amount} EUR"],
        "NOTICE": [
            f"The meeting about {topic}",
            f"is moved to {when}.",
            f"Please tell {sender}",
            "if you cannot come.",
        ],
        "MEMO": [f"From: {sender}", f"To: {receiver}", f"Subject: {topic}", f"Budget: {amount} EUR"],
    }[kind] + [f"Date: {when}"]
    font_size = min(size[1] / 14, size[0] / 20, size[0] * 1.5 / max(map(len, lines)))
    pen.text((size[0] * 0.08, size[1] * 0.1), kind, ink, _font(font_size * 1.5))
    for i, line in enumerate(lines):
        pen.text((size[0] * 0.08, size[1] * 0.3 + i * font_size * 1.6), line, ink, _font(font_size))
    questions = (
        ("Read the text in the picture.", "\n".join([kind, *lines])),
        ("Which date is on it?", f"{when}."),
        ("What kind of document is this?", f"A{'n' if kind == 'INVOICE' else ''} {kind.lower()}."),
    )
    return Picture(image, f"A page headed {kind}, dated {when}.", questions)


def _table(rng: random.Random, size: tuple[int, int]) -> Picture:
    image, pen, ink = _canvas(rng, size)
    header = ("Name", "City", "Points")
    rows = [(name, rng.choice(CITIES), rng.randrange(10, 999)) for name in rng.sample(GIVEN_NAMES, rng.randint(3, 6))]
    height, width = size[1] / (len(rows) + 2), size[0] * 0.9 / 3
    text = min(height * 0.45, width / 7)
    for i, row in enumerate((header, *rows)):
        y = height * (i + 0.5)
        pen.line((size[0] * 0.05, y + height, size[0] * 0.95, y + height), ink, 2 if i == 0 else 1)
        for j, value in enumerate(row):
            pen.text((size[0] * 0.06 + j * width, y + height / 2), str(value), ink, _font(text), anchor="lm")
    best, asked = max(rows, key=lambda row: row[2]), rng.choice(rows)
    as_markdown = "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ("---",) * 3, *rows))
    questions = (
        ("Who has the most points?", f"{best[0]}, with {best[2]}."),
        (f"Which city is {asked[0]} from?", f"{asked[1]}."),
        ("Write the table in Markdown.", as_markdown),
    )
    return Picture(image, f"A table of {len(rows)} people with name, city and points.", questions)


def _scene(rng: random.Random, size: tuple[int, int]) -> Picture:
    """Shapes of several colours and places on a shaded ground."""
    image, _, _ = _canvas(rng, size)
    tint = Image.new("RGB", size, rng.choice(COLOURS)[1])
    strength = rng.uniform(0.2, 0.6)
    slope = Image.linear_gradient("L").resize(size).point([int(value * strength) for value in range(256)])
    image.paste(tint, (0, 0), slope)
    pen = ImageDraw.Draw(image)
    cells = [(i, j) for i in range(3) for j in range(3)]
    things = []
    for i, j in sorted(rng.sample(cells, rng.randint(2, 6))):
        (name, colour), shape = rng.choice(COLOURS), rng.choice(_SHAPES)
        x, y = size[0] * (2 * i + 1) / 6, size[1] * (2 * j + 1) / 6
        _shape(pen, shape, x, y, min(size) / 6 * rng.uniform(0.5, 0.9), colour)
        place = ("top", "middle", "bottom")[j] + " " + ("left", "centre", "right")[i]
        things.append((name, shape, place))
    name, shape, place = rng.choice(things)
    names = [f"a {name} {shape} ({place})" for name, shape, place in things]
    number = sum(thing[1] == shape for thing in things)
    questions = (
        ("How many shapes are there?", f"{len(things)}."),
        (f"What is at the {place}?", f"A {name} {shape}."),
        (f"How many of the shapes are a {shape}?", f"{number}."),
    )
    return Picture(image, f"{len(things)} shapes: {listed(names)}.", questions)


def _shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: _Colour) -> None:
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour, _BLACK)
    elif shape == "square":
        pen.rectangle((x - radius, y - radius, x + radius, y + radius), colour, _BLACK)
    else:
        corners = 3 if shape == "triangle" else 10
        lengths = [radius if shape == "triangle" or i % 2 == 0 else radius * 0.45 for i in range(corners)]
        angles = [2 * math.pi * i / corners - math.pi / 2 for i in range(corners)]
        pen.polygon(
            [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(lengths, angles, strict=True)], colour, _BLACK
        )
