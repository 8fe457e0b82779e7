"""The problems of ``step128-eval reasoning``: each answer follows from the words alone, and is read as it is meant."""

from __future__ import annotations

from itertools import permutations

import pytest

from step128_evals.reasoning.problems import Problem, is_correct, make_problems, read_answer


def test_problems_are_always_the_same_and_mixed() -> None:
    assert make_problems(12) == make_problems(30)[:12]
    assert [problem.kind for problem in make_problems(4)] == ["arithmetic", "order", "counting", "arithmetic"]
    assert len({problem.question for problem in make_problems(60)}) == 60


def numbers(problem: Problem) -> list[int]:
    return [int(part) for part in "".join(c if c.isdigit() else " " for c in problem.question).split()]


@pytest.mark.parametrize("problem", make_problems(30), ids=lambda problem: problem.id)
def test_answers_follow_from_the_words_alone(problem: Problem) -> None:
    """Solved again from the text."""
    if problem.kind == "arithmetic":
        crates, boxes, cups, broken, price, days, rent = numbers(problem)
        assert int(problem.answer) == price * (crates * boxes * cups - broken) - rent * days
    elif problem.kind == "counting":
        low, high, divisor, other, digit = numbers(problem)
        whole = [n for n in range(low, high + 1) if not n % divisor and n % other]
        assert int(problem.answer) == len([n for n in whole if str(digit) not in str(n)])
    else:
        listed, _, rest = problem.question.partition(" stand in a row, in an order that you have to find. ")
        *clues, question, _ = rest.replace("?", ".").split(". ")
        place = ["first", "second", "third", "fourth", "fifth", "sixth"].index(question.split()[3])
        rows = permutations(listed.replace(" and ", ", ").split(", "))
        left = [row for row in rows if all(holds(clue, row) for clue in clues)]
        assert [row[place] for row in left] == [problem.answer]


def holds(clue: str, row: tuple[str, ...]) -> bool:
    parts = clue.split()
    one, other = (row.index(name) for name in parts if name in row)
    if "neighbours" in clue:
        return abs(one - other) == 1
    return one < other if "left of" in clue else abs(one - other) - 1 == int(parts[1])


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("Answer: 42", "42"),
        ("**Answer: 1,234 crowns.**", "1234"),
        ("Answer: 3\nNo, that was wrong.\nanswer = $-7$", "-7"),
        ("The answer is: \\boxed{12}", "12"),
        ("Answer: `Ada`!", "Ada"),
        ("Answer: 12 or 13", "12 or 13"),
        ("Answer: 57 numbers", "57"),
        ("Answer: 12 345", "12345"),
        ("Answer: 12345.00", "12345"),
        ("Answer: 12345.5", "12345.5"),
        ("Answer: \\(12345\\)", "12345"),
        ("Answer: \u22121,234 crowns left", "-1234"),
        ("Answer: 40 + 2 = 42", "42"),
        ("Answer: Ada is first", "Ada"),
        ("Answer: Bram, left of Ada", "Bram"),
        ("Answer: Ada or Bram", "Ada or Bram"),
        ("I think 42", None),
        ("", None),
    ],
)
def test_reading_an_answer(said: str, read: str | None) -> None:
    assert read_answer(said) == read
    assert is_correct(Problem("p", "k", "q", "ADA"), said) is (read == "Ada")
