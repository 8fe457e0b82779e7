"""One answer's score in `--mode step128`: exact lines, and what is forgiven beside them."""

import pytest

from step128_evals.needle.scoring import answer_lines, invented_lines, score_lines

ASKED = [f"    step({number})" for number in range(20)]
TEXT = "\n".join(ASKED)
FUNCTION = ["@cached", "def f(", "    a,", "):", *ASKED, "    return 1"]


def scores(answer: str) -> list[tuple[bool, int]]:
    """(passed, lines) under exact, rstrip, strip."""
    said = answer_lines(answer)
    found = score_lines(ASKED, said, invented_lines(FUNCTION, said))
    return [(found[name].passed, found[name].lines) for name in ("exact", "rstrip", "strip")]


WRONG = TEXT.replace("step(7)", "step(70)")
ALL, NONE = (True, 20), (False, 0)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (TEXT, [ALL] * 3),
        (f"```python\n{TEXT}\n```", [ALL] * 3),
        (f"Here you are:\n\n```\n{TEXT}\n```\nAnything else?", [ALL] * 3),
        (f"```python\n{TEXT}", [ALL] * 3),  # the closing fence was cut off, and nothing else
        (f"    ```\n{TEXT}\n    ```", [ALL] * 3),
        (TEXT.replace("\n", "\r\n"), [ALL] * 3),
        (TEXT.replace("\n", "\r"), [ALL] * 3),
        ("\n\n  \n".join(ASKED), [ALL] * 3),  # blank lines never count
        (f"def f(\n    a,\n):\n{TEXT}\n    return 1", [ALL] * 3),  # the signature before, the body going on after
        (f"@cached\ndef f(\na,\n):\n{TEXT}", [ALL] * 3),  # whose indentation is not asked for
        (f"~~~\n{TEXT}\n~~~", [ALL] * 3),
        (f"```\n{WRONG}\n```\nOr rather:\n```\n{TEXT}\n```", [ALL] * 3),  # the last block is the answer
        (f"```\n{TEXT}\n```\n```\n\n```\n```", [ALL] * 3),  # the last with a line in it
        (f"```\n{TEXT}\n```\nOr rather:\n```\n{WRONG}\n```", [(False, 19)] * 3),
        ("```\n{}\n```\nand\n```\n{}\n```".format("\n".join(ASKED[:10]), "\n".join(ASKED[10:])), [(False, 10)] * 3),
        (f"{WRONG}\n{TEXT}", [(False, 20)] * 3),  # two attempts in one
        (f"{TEXT}\n{TEXT}", [(False, 20)] * 3),
        (f"def before():\n    pass\n{TEXT}", [(False, 20)] * 3),
        (f"{TEXT}\n    return 1\ndef after():\n    pass", [(False, 20)] * 3),
        (f"Here you are:\n{TEXT}", [(False, 20)] * 3),  # prose belongs outside a code block
        (f"<think>\nstep(0)?\n</think>\n\n{TEXT}", [ALL] * 3),
        (f"thinking without its beginning</think>{TEXT}", [ALL] * 3),
        (f"<think>\n{TEXT}", [NONE] * 3),  # never came to an answer
        ("", [NONE] * 3),
        ("I cannot see that function.", [NONE] * 3),
        ("\n".join(line + " " for line in ASKED), [NONE, ALL, ALL]),
        ("\n".join(line.strip() for line in ASKED), [NONE, NONE, ALL]),
        (TEXT.replace("    ", "\t"), [NONE, NONE, ALL]),
        (TEXT.strip(), [(False, 19), (False, 19), ALL]),  # only the first line lost its indentation
        ("\n".join(ASKED[:13]), [(False, 13)] * 3),
        (TEXT.replace("step(7)", "step(70)"), [(False, 19)] * 3),
        (TEXT.replace("step(7)\n", "step(7)\n    more()\n"), [(False, 20)] * 3),  # a line in between
        ("\n".join([*ASKED[:5], *ASKED[6:]]), [(False, 19)] * 3),
        ("\n".join([ASKED[1], ASKED[0], *ASKED[2:]]), [(False, 19)] * 3),
        (TEXT.replace("step(3)", "step( 3)"), [(False, 19)] * 3),
    ],
)
def test_scores(answer: str, wanted: list[tuple[bool, int]]) -> None:
    assert scores(answer) == wanted


def test_trailing_whitespace_of_the_file_must_be_copied() -> None:
    asked = ["    a  ", "    b"]
    assert score_lines(asked, answer_lines("    a  \n    b"), 0)["exact"].passed
    without = score_lines(asked, answer_lines("    a\n    b"), 0)
    assert not without["exact"].passed
    assert without["rstrip"].passed


def test_invented_lines_are_of_no_part_of_the_function() -> None:
    said = ["def f(", "step(0)", "    step(19)", "    nowhere()", "step(0)"]
    assert invented_lines(FUNCTION, said) == 2
