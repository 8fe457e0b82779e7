"""The whole set of questions of a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from random import Random

from step128_evals.files import sha256, write_whole
from step128_evals.vision.charts import bar_questions, line_questions, pie_questions
from step128_evals.vision.item import Question
from step128_evals.vision.shapes import colour_questions, counting_questions, pair_questions, position_questions
from step128_evals.vision.texts import code_questions, sentence_questions, table_questions

SEED = 42

_MAKERS: dict[str, Callable[[Random], Iterator[Question]]] = {
    "bar": bar_questions,
    "line": line_questions,
    "pie": pie_questions,
    "code": code_questions,
    "table": table_questions,
    "sentence": sentence_questions,
    "counting": counting_questions,
    "position": position_questions,
    "colour": colour_questions,
    "pair": pair_questions,
}


@lru_cache(maxsize=1)
def make_questions(sets: int, seed: int = SEED) -> tuple[Question, ...]:
    """``sets`` sets of the same kinds of questions, with other contents; the same on every machine."""
    questions = []
    for number in range(sets):
        for name, make in _MAKERS.items():
            # A generator for each kind: a new question of one leaves the others as they are.
            made = make(Random(f"{seed}.{number}.{name}"))
            questions += [replace(question, id=f"{number}.{question.id}") for question in made]
    return tuple(questions)


def questions_sha256(questions: tuple[Question, ...]) -> str:
    """Of all texts, answers and pixels."""
    rows = [[q.id, q.text, q.answer, q.kind, *(picture.sha256 for picture in q.pictures)] for q in questions]
    return sha256(json.dumps(rows))


def save_images(questions: tuple[Question, ...], folder: Path) -> int:
    """Write every picture as PNG, and ``questions.json`` beside them; returns the number of pictures.

    Raises:
        CannotWriteError: the folder cannot be made or written.
    """
    rows, count = [], 0
    for question in questions:
        names = []
        for place, picture in enumerate(question.pictures, start=1):
            name = f"{question.id}.{place}.png"
            write_whole(folder / name, picture.png)
            names.append({"file": name, "sha256": picture.sha256})
        rows.append({"id": question.id, "question": question.text, "answer": question.answer, "pictures": names})
        count += len(names)
    write_whole(folder / "questions.json", json.dumps(rows, indent=1) + "\n")
    return count
