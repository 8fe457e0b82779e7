"""Problems with exact answers, generated: arithmetic in words, orders in a row, and counting. Answers are computed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

from step128_evals.chat import SEED

_NAMES = ("Ada", "Bram", "Carla", "Dario", "Elif", "Fynn", "Greta", "Hugo")
_THOUSANDS = re.compile("(?<![\\d.,])[0-9]{1,3}([ ,'\u00a0\u202f\u2009])[0-9]{3}(?:\\1[0-9]{3})*(?![0-9])")
_NUMBER = re.compile(r"(?<![\w.])-?[0-9]+(?:\.[0-9]+)*")
_FORM = "Finish with one line of the form: Answer: X"


@dataclass(frozen=True)
class Problem:
    """``answer`` is a whole number or a name."""

    id: str
    kind: str
    question: str
    answer: str


def make_problems(count: int) -> list[Problem]:
    """The first ``count`` problems, the kinds in turn; always the same ones."""
    generator = random.Random(SEED)
    makers: tuple[Callable[[random.Random], tuple[str, str]], ...] = (_arithmetic, _order, _counting)
    problems = []
    for number in range(count):
        maker = makers[number % len(makers)]
        question, answer = maker(generator)
        kind = maker.__name__.strip("_")
        problems.append(Problem(f"{kind}-{number}", kind, f"{question} {_FORM}", answer))
    return problems


def _arithmetic(generator: random.Random) -> tuple[str, str]:
    crates, boxes, pieces = generator.randint(12, 48), generator.randint(11, 29), generator.randint(13, 37)
    broken, price = generator.randint(101, 899), generator.randint(3, 17)
    days = generator.randint(5, 19)
    question = (
        f"{crates} crates arrive with {boxes} boxes each, and {pieces} cups in every box. {broken} cups are broken and "
        f"thrown away; the others are sold for {price} crowns each, and {days} days of rent at 275 crowns a day are "
        "paid from that. How many crowns are left?"
    )
    return question, str((crates * boxes * pieces - broken) * price - days * 275)


def _order(generator: random.Random) -> tuple[str, str]:
    """Clues are added until one order is left."""
    names = generator.sample(_NAMES, 6)
    solution = generator.sample(names, 6)
    orders = list(permutations(names))
    clues = []
    while len(orders) > 1:
        first, second = generator.sample(range(6), 2)
        one, other = solution[first], solution[second]
        clue, holds = _clue(one, other, second - first)
        left = [order for order in orders if holds(order)]
        if len(left) < len(orders):
            clues.append(clue)
            orders = left
    place = generator.randrange(6)
    ordinal = ("first", "second", "third", "fourth", "fifth", "sixth")[place]
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    asked = f"Who is the {ordinal} from the left?"
    return f"{listed} stand in a row, in an order that you have to find. {' '.join(clues)} {asked}", solution[place]


def _clue(one: str, other: str, distance: int) -> tuple[str, Callable[[tuple[str, ...]], bool]]:
    if abs(distance) == 1:
        return f"{one} and {other} are neighbours.", lambda row: abs(row.index(one) - row.index(other)) == 1
    if distance > 0:
        return f"{one} is somewhere to the left of {other}.", lambda row: row.index(one) < row.index(other)
    between = -distance - 1
    people = "person is" if between == 1 else "people are"
    return (
        f"Exactly {between} {people} between {one} and {other}.",
        lambda row: abs(row.index(one) - row.index(other)) == between + 1,
    )


def _counting(generator: random.Random) -> tuple[str, str]:
    low = generator.randint(100, 400)
    high = low + generator.randint(150, 420)
    divisor, other = generator.choice([(3, 4), (4, 6), (6, 8), (7, 3), (9, 6)])
    digit = generator.randint(1, 9)
    found = sum(n % divisor == 0 and n % other != 0 and str(digit) not in str(n) for n in range(low, high + 1))
    question = (
        f"How many whole numbers from {low} to {high}, both included, can be divided by {divisor} but not by {other}, "
        f"and do not have the digit {digit}?"
    )
    return question, str(found)


def read_answer(text: str) -> str | None:
    """What an answer's last line of the form ``Answer: X`` says, without decoration; None if there is none.

    The rule: the first word of the line that is one of the names; else its first number, after the last ``=`` if there
    is one, without what stands between thousands or zeros after the point. A line with "or" says nothing certain: it is
    given as it is, as one with neither name nor number.
    """
    found = re.findall(r"answer\s*(?:is)?\s*[:=]\s*([^\n]+)", re.sub(r"[*_`$]", "", text), re.IGNORECASE)
    if not found:
        return None
    said = re.sub(r"\\(?:boxed|text)\{([^{}]*)\}|\\[()\[\]]", r"\1", found[-1]).strip().rstrip(".!").strip()
    words = re.findall(r"\w+", said)
    if any(word.casefold() == "or" for word in words):
        return said
    if names := [name for word in words for name in _NAMES if word.casefold() == name.casefold()]:
        return names[0]
    plain = _THOUSANDS.sub(lambda m: m[0].replace(m[1], ""), said.replace("\u2212", "-").rpartition("=")[2])
    number = _NUMBER.search(plain)
    return re.sub(r"\.0+$", "", number[0]) if number else said


def is_correct(problem: Problem, text: str) -> bool:
    """Whether an answer says the right number or name."""
    said = read_answer(text)
    return said is not None and said.casefold() == problem.answer.casefold()
