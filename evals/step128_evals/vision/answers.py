"""From what a model said to right or wrong: one rule for all questions, which :data:`RULE` states."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from step128_evals.chat import Answer, split_reasoning
from step128_evals.vision.item import Kind

RULE = (
    "The answer is the last line with anything in it, after an 'Answer:' if it begins with one, without quotation "
    "marks, Markdown's marks and a full stop at the end. Numbers are compared as numbers, without separators of "
    "thousands and a percent sign; texts letter by letter, but for their case and the number of spaces. "
    "Reasoning does not count. The right value among other words does not count either (it is counted apart)."
)

WRONG, WORDY, EMPTY, CUT = "wrong", "not alone", "no answer", "cut off"
FAILURES = {
    WRONG: "another value",
    WORDY: "the right value, but among other words",
    EMPTY: "no answer at all",
    CUT: "the answer was cut off at --max-tokens",
}

_LABEL = re.compile(r"\A(?:the )?(?:final )?answer\s*(?:is)?\s*:\s*", re.IGNORECASE)
_BOX = re.compile(r"\A\$*\\boxed\{(?:\\text\{)?([^{}]*)\}*\$*\Z")
_MARKS = "*_`\"'\u201c\u201d\u201e\u2018\u2019\u00ab\u00bb"
_THOUSANDS = re.compile(r"\A([+-]?)(\d{1,3})((?:[,'\u2019 \u00a0\u202f]\d{3})+)(\.\d+)?\Z")


def final_answer(text: str) -> str:
    """The answer in a text, by :data:`RULE`; empty if there is none. A LaTeX box around it goes too."""
    lines = [line.strip() for line in split_reasoning(text)[1].splitlines() if line.strip()]
    if not lines:
        return ""
    answer = _LABEL.sub("", lines[-1].strip(_MARKS)).strip()
    previous = None
    while answer != previous:  # marks lie in one another: "**`Plum`**."
        previous = answer
        answer = answer.strip(_MARKS + " ").removesuffix(".")
        if box := _BOX.match(answer):
            answer = box[1]
    return answer


def is_right(answer: str, expected: str, kind: Kind) -> bool:
    """Whether a final answer is the expected one."""
    if kind == "number":
        value = _number(answer)
        return value is not None and value == Decimal(expected)
    return _plain(answer) == _plain(expected)


def find_failure(answer: Answer, expected: str, kind: Kind) -> str | None:
    """None if the answer is right, else the key of :data:`FAILURES` that says why not."""
    if is_right(final_answer(answer.text), expected, kind):
        return None
    if answer.finish_reason == "length":
        return CUT
    said = split_reasoning(answer.text)[1]
    if not said.strip():
        return EMPTY
    within = re.search(rf"(?<!\w){re.escape(_plain(expected))}(?!\w)", _plain(said))
    return WORDY if within else WRONG


def _plain(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").casefold()


def _number(text: str) -> Decimal | None:
    text = text.removesuffix("%").strip()
    if groups := _THOUSANDS.match(text):
        sign, head, rest, decimals = groups.groups()
        text = sign + head + re.sub(r"\D", "", rest) + (decimals or "")
    if not re.fullmatch(r"[+-]?\d+(\.\d+)?", text, re.ASCII):
        return None
    try:
        return Decimal(text)
    except InvalidOperation:
        return None
