"""A right figure or word is found however it is written, and a wrong one is not."""

from __future__ import annotations

import pytest
from tool_answers import BY_ID

from step128_evals.chat import Answer
from step128_evals.tools.checks import check_answer
from step128_evals.tools.wording import has


@pytest.mark.parametrize(
    ("text", "part", "found"),
    [
        ("The code is E\u20114471.", "e-4471", True),
        ("It is 26.4C.", "26.4", True),
        ("At 5:47am", "5:47", True),
        ("6915USD", "6915", True),
        ("25 384 in all", "25384", True),
        ("25,384.00", "25384", True),
        ("17.30", "17.3", True),
        ("It is 43.0.", "43", True),
        ("Jyva\u0308skyla\u0308", "jyv\u00e4skyl\u00e4", True),
        ("7\u202f381.46 EUR", "7381.46", True),
        ("148", "48", False),
        ("48.5", "48", False),
        ("17.31", "17.3", False),
        ("15:47", "5:47", False),
        ("E-44710", "e-4471", False),
        ("version 1.43.2", "1.43", False),
        ("43,000", "43", False),
        ("Sukkar", "k", False),
    ],
)
def test_has(text: str, part: str, found: bool) -> None:
    assert has(text, part) is found


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("No, the library has no book about that.", True),
        ("I haven\u2019t found a book about doorknobs; 0 results, none at all.", True),
        ("There is no doubt: it costs 12 euros.", False),
        ("No problem! It is 'The Turning Knob' of 1987.", False),
        ("Yes, why not: 'The Turning Knob'.", False),
    ],
)
def test_nothing_is_invented_where_nothing_was_found(text: str, right: bool) -> None:
    scenario = BY_ID["errors-nothing-found"]
    verdict = check_answer(scenario, scenario.steps[1], Answer(text, "", (), "stop", 9, 0.1, 0.2))
    assert [fault.kind for fault in verdict.faults] == ([] if right else ["result_not_used"])
