"""The pictures and the rule of ``vision``: the answers are recomputed from the pixels where pixels can say it."""

from __future__ import annotations

import hashlib
import io
import json
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from step128_evals.chat import Answer
from step128_evals.vision import charts, questions
from step128_evals.vision.answers import final_answer, find_failure, is_right
from step128_evals.vision.drawing import COLOURS, INK, SHAPES, TILE, Canvas, Picture
from step128_evals.vision.questions import make_questions, questions_sha256, save_images


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.int32)


def islands(mask: np.ndarray) -> int:
    """Number of connected areas (4 neighbours)."""
    from scipy import ndimage

    return int(ndimage.label(mask)[1])


def test_the_whole_set() -> None:
    whole = make_questions(1)
    assert len({q.id for q in whole}) == len(whole) == 82
    assert max(q.largest_side for q in whole) == 3024 and min(q.largest_side for q in whole) < TILE[0]
    for question in whole[::9]:
        for picture in question.pictures:
            size = f"{picture.width}x{picture.height}\n".encode()
            found = pixels(picture.png).astype(np.uint8)
            assert found.shape == (picture.height, picture.width, 3)
            assert hashlib.sha256(size + found.tobytes()).hexdigest() == picture.sha256


def test_a_seed_decides_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    some = {name: questions._MAKERS[name] for name in ("pie", "table")}
    monkeypatch.setattr(questions, "_MAKERS", some)
    make = make_questions.__wrapped__  # without the cache
    one, two, other = make(1), make(2), make(1, seed=7)
    assert questions_sha256(two[: len(one)]) == questions_sha256(one) != questions_sha256(other)
    first, second = two[: len(one)], two[len(one) :]
    assert {q.id.replace("0.", "1.", 1) for q in first} == {q.id for q in second}
    assert not {p.sha256 for q in first for p in q.pictures} & {p.sha256 for q in second for p in q.pictures}


@pytest.mark.parametrize("size", [448, 728, 1512, 2016])
def test_shapes_of_a_colour_are_as_many_as_the_answer_says(size: int) -> None:
    question = next(q for q in make_questions(1) if q.id == f"0.count-colour-{size}")
    colour = next(name for name in COLOURS if f"are {name}?" in question.text)
    mask = (pixels(question.pictures[0].png) == COLOURS[colour]).all(axis=2)
    assert islands(mask) == int(question.answer)


def test_bars_are_as_many_and_as_high_as_the_answers_say() -> None:
    for size in (448, 728, 1512, 2016):
        by_place = {q.id[-1]: q for q in make_questions(1) if q.id.startswith(f"0.bar-{size}")}
        mask = (pixels(by_place["1"].pictures[0].png) == COLOURS["blue"]).all(axis=2)
        assert islands(mask) == int(by_place["3"].answer)


def test_names_under_bars_do_not_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[list[tuple[float, float]]] = []

    class Measured(Canvas):
        def __init__(self, size: tuple[int, int]) -> None:
            super().__init__(size)
            self.names: list[tuple[float, float]] = []
            rows.append(self.names)

        def text(self, at: tuple[float, float], text: str, pixels: float, anchor: str = "mm", fill: Any = INK) -> None:
            if text in charts.FRUIT:
                half = self.text_width(text, pixels) / 2
                self.names.append((at[0] - half, at[0] + half))

        def picture(self) -> Picture:
            return Picture(b"", "", self.width, self.height)

    monkeypatch.setattr(charts, "Canvas", Measured)
    for number in range(100):
        list(charts.bar_questions(Random(f"42.{number}.bar")))
    assert len(rows) == 400 and {len(row) for row in rows} == {4, 5, 6, 7, 8}
    for row in rows:
        assert all(left[1] < right[0] for left, right in pairwise(row))


def test_values_without_a_label_lie_on_a_grid_line() -> None:
    for question in make_questions(1):
        if question.id in ("0.bar-728-1", "0.bar-2016-1", "0.line-448-1", "0.line-728-1", "0.line-2016-1"):
            assert int(question.answer) % 5 == 0


def test_one_shape_changes_its_colour_and_nothing_else() -> None:
    for question in (q for q in make_questions(1) if "pair-change" in q.id):
        one, two = (pixels(picture.png) for picture in question.pictures)
        changed = (one != two).any(axis=2)
        assert islands(changed) == 1
        assert {tuple(colour) for colour in two[changed]} == {COLOURS[question.answer]}


def test_codes_lie_whole_in_the_picture() -> None:
    for question in (q for q in make_questions(1) if q.category == "code"):
        dark = (pixels(question.pictures[0].png) < 128).all(axis=2)
        assert islands(dark) >= 5 and not dark[0].any() and not dark[-1].any()
        assert not dark[:, 0].any() and not dark[:, -1].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_stays_in_its_circle(shape: str) -> None:
    canvas = Canvas((200, 200))
    canvas.shape(shape, (100, 100), 80, "red")
    mask = (pixels(canvas.picture().png) == COLOURS["red"]).all(axis=2)
    rows, columns = np.nonzero(mask)
    assert islands(mask) == 1 and mask.sum() > 4000
    assert np.hypot(rows - 100, columns - 100).max() <= 81


def test_saved_images(tmp_path: Path) -> None:
    some = tuple(q for q in make_questions(1) if q.id in ("0.code-448-20px", "0.pair-code-448"))
    assert save_images(some, tmp_path / "new" / "folder") == 3
    rows = json.loads((tmp_path / "new" / "folder" / "questions.json").read_text())
    assert [row["answer"] for row in rows] == [q.answer for q in some]
    names = {entry["file"] for row in rows for entry in row["pictures"]}
    assert names == {path.name for path in (tmp_path / "new" / "folder").glob("*.png")} and len(names) == 3


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        (" 42.\n", "42"),
        ("**42**", "42"),
        ('"Plum".', "Plum"),
        ("**`Plum`**.", "Plum"),
        ("I count.\nAnswer: 42", "42"),
        ("The answer is: Plum.", "Plum"),
        ("**Answer:** Plum", "Plum"),
        ("$\\boxed{42}$", "42"),
        ("\\boxed{\\text{Plum}}", "Plum"),
        ("<think>\n41?\n</think>\n\n42", "42"),
        ("42\n\n", "42"),
        ("", ""),
        ("  \n ", ""),
    ],
)
def test_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("1240", "1240", True),
        ("1,240", "1240", True),
        ("1 240", "1240", True),
        ("1\u202f240", "1240", True),
        ("1240.0", "1240", True),
        ("25 %", "25", True),
        ("12,40", "1240", False),
        ("1.240", "1240", False),
        ("124", "1240", False),
        ("1240 pieces", "1240", False),
        ("about 1240", "1240", False),
        ("four", "4", False),
        ("٤", "4", False),
        ("", "4", False),
        ("4" * 5000, "4", False),
    ],
)
def test_numbers(answer: str, expected: str, right: bool) -> None:
    assert is_right(answer, expected, "number") is right


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("plum", "Plum", True),
        ("Our  neighbour sang.", "Our neighbour sang.", True),
        ("Our neighbour sang", "Our neighbour sang.", True),
        ("Our neighbor sang", "Our neighbour sang.", False),
        ("k7qm2x", "K7QM2X", True),
        ("K7QM2", "K7QM2X", False),
        ("K7QM2X1", "K7QM2X", False),
        ("K7 QM2X", "K7QM2X", False),
    ],
)
def test_texts(answer: str, expected: str, right: bool) -> None:
    assert is_right(answer, expected, "text") is right


@pytest.mark.parametrize(
    ("text", "finish", "failure"),
    [
        ("4", "stop", None),
        ("4", "length", None),
        ("14", "stop", "wrong"),
        ("There are 4 of them", "stop", "not alone"),
        ("There are 14 of them", "stop", "wrong"),
        ("", "stop", "no answer"),
        ("<think>4</think>", "stop", "no answer"),
        ("There are", "length", "cut off"),
    ],
)
def test_failures(text: str, finish: str, failure: str | None) -> None:
    answer = Answer(text, "", (), finish, 1, 0.1, 0.2)
    assert find_failure(answer, "4", "number") == failure
