"""Haystacks: never over the budget, with functions that are really in them, at the depths that are said."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from needle_texts import python_function, write_corpus
from oracle import words

from step128_evals.corpus import Corpus, SourceFile, python_corpus
from step128_evals.errors import BadInputError, UnsupportedError
from step128_evals.needle.functions import Function, find_functions
from step128_evals.needle.haystack import Haystack, Placed, build_haystack
from step128_evals.needle.lengths import answer_budget, prompt_lengths
from step128_evals.needle.placing import depths_of_items, items_of_lengths, place
from step128_evals.needle.plan import Plan, plan_items
from step128_evals.needle.question import question
from step128_evals.needle.segments import Shelf


@dataclass
class Counter:
    """Counts as the oracle does, and remembers how much it was given at once."""

    longest: int = 0
    calls: int = 0
    exact: bool = True

    async def count(self, text: str) -> int:
        self.longest, self.calls = max(self.longest, len(text)), self.calls + 1
        return len(words(text))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return python_corpus(write_corpus(tmp_path_factory.mktemp("corpus")))


def plan(
    corpus: Corpus, lengths: list[int], items: int, overhead: int = 5, depths: tuple[int, ...] = (0, 25, 50, 75, 100)
) -> tuple[Plan, Counter]:
    counter = Counter()
    shelf = Shelf(corpus, counter, 20, 42)  # type: ignore[arg-type]
    return asyncio.run(plan_items(shelf, counter, lengths, depths, items, 20, overhead)), counter  # type: ignore[arg-type]


def test_a_function_has_its_real_signature_and_its_lines_that_are_not_blank() -> None:
    text = "import os\n\x0c\n" + python_function("first", 25) + "async def second(a): return 1\n"
    first = find_functions(SourceFile("a.py", text), 20)[0]
    lines = text.split("\n")
    assert first.signature == "def first(\n    value: int,\n) -> int:  # adds"
    assert lines[first.first_line] == "def first("
    assert len(first.body) == 25
    assert first.body[0] == '    """Add to first."""'
    assert first.body[-1] == lines[first.last_line] == "    value = value + 24  # step 24 of first"


@pytest.mark.parametrize(
    "text",
    [
        python_function("short", 19),
        python_function("long_name_" + "x" * 200, 30),
        python_function("f", 30).replace("# step 3", "\n```\n#"),
        python_function("f", 30).replace("# step 3 ", "# </think>"),
        python_function("f", 30).replace("# step 25 ", "# <think>"),  # a body may go on
        python_function("f", 30).replace("# adds", "# ~~~"),
        "def broken(:\n",
        "def outer():\n    def inner():\n        " + "\n        ".join(["pass"] * 15) + "\n",
    ],
)
def test_functions_that_are_not_asked_about(text: str) -> None:
    assert find_functions(SourceFile("a.py", text), 20) == []


def test_decorators_are_lines_of_a_function() -> None:
    text = "@one\n@two(\n    3\n)\n" + python_function("f", 20)
    function = find_functions(SourceFile("a.py", text), 20)[0]
    assert function.decorators == ("@one", "@two(", "    3", ")")
    assert list(function.lines) == [line for line in text.split("\n") if line]


def test_a_comment_under_the_signature_is_a_body_line() -> None:
    text = "def f():\n    # why\n" + "    pass\n" * 20
    assert find_functions(SourceFile("a.py", text), 20)[0].body[0] == "    # why"


@pytest.mark.parametrize("case", range(25))
def test_a_haystack_keeps_its_budget_and_its_word(corpus: Corpus, case: int) -> None:
    rng = random.Random(case)
    budget, start, seed = rng.randint(900, 12_000), rng.randint(0, 100), rng.randint(0, 3)
    counter = Counter()

    async def build() -> tuple[Haystack, int]:
        shelf = Shelf(corpus, counter, 20, seed)  # type: ignore[arg-type]
        return await build_haystack(shelf, counter, budget, start)  # type: ignore[arg-type]

    haystack, position = asyncio.run(build())
    assert haystack.tokens == len(words(haystack.text)) <= budget
    assert haystack.tokens > 0.9 * budget
    assert (haystack, position) == asyncio.run(build())
    assert position > start
    assert haystack.placed[0].depth < 0.05
    assert haystack.placed[-1].depth > 0.999
    lines = haystack.text.split("\n")
    for placed in haystack.placed:
        function = placed.function
        where = lines.index(function.signature.split("\n")[0])
        body = [line for line in lines[where + 3 :] if line.strip()]
        assert body[: len(function.body)] == list(function.body)
        assert haystack.text.count(f"def {function.name}(") == 1
        before = len(words("\n".join(lines[:where])))
        own = len(words("\n".join([function.signature, *function.body])))
        assert placed.depth == pytest.approx(before / (haystack.tokens - own), abs=0.04)


def test_a_plan_keeps_every_length_and_asks_each_function_once(corpus: Corpus) -> None:
    planned, _ = plan(corpus, [5120, 6144, 8192], 40)
    assert not planned.missing
    assert len({item.id for item in planned.items}) == len(planned.items) == 40
    assert len({(item.placed.function.file, item.placed.function.name) for item in planned.items}) == 40
    for item in planned.items:
        prompt = item.haystack.text + question(item.placed.function, 20)
        assert len(words(prompt)) + 5 <= item.counted_tokens <= item.length_tokens
        assert item.counted_tokens > 0.85 * item.length_tokens
        assert abs(100 * item.placed.depth - item.depth_percent) <= 5
    by_length = {length: [item for item in planned.items if item.length_tokens == length] for length in (5120, 8192)}
    assert {item.depth_percent for item in by_length[8192]} == {0, 25, 50, 75, 100}
    assert len({item.haystack.sha256 for item in by_length[8192]}) <= 8


@pytest.mark.parametrize(("depths", "tolerance"), [((0, 100), 5), ((50,), 5), ((0, 6, 100), 3), ((0, 1), 0.5)])
def test_no_function_stands_elsewhere_than_its_depth_says(
    corpus: Corpus, depths: tuple[int, ...], tolerance: float
) -> None:
    planned, _ = plan(corpus, [8192], 40, depths=depths)
    assert planned.tolerance_percent == tolerance
    assert {item.depth_percent for item in planned.items} <= set(depths)
    assert all(abs(100 * item.placed.depth - item.depth_percent) <= tolerance for item in planned.items)
    assert len(planned.items) + planned.missing.get(8192, 0) == 40
    assert len(planned.items) >= 20


def test_tokenizing_is_bounded() -> None:
    rng = random.Random(0)
    files = [
        SourceFile(f"{n}.py", "\n\n".join(python_function(f"f_{n}_{k}", rng.randint(20, 60)) for k in range(6)))
        for n in range(80)
    ]
    planned, counter = plan(Corpus("made", tuple(files)), [50_000], 20)
    haystacks = {item.haystack.sha256 for item in planned.items}
    assert len(haystacks) <= 2
    assert counter.calls < len(files) + 90  # each file once, two bisections, the whole, the questions


def test_a_small_corpus_is_said(tmp_path: Path) -> None:
    corpus = python_corpus(write_corpus(tmp_path, files=3))
    with pytest.raises(BadInputError, match="too small for a haystack"):
        plan(corpus, [20_000], 4)


def test_too_few_functions_are_said(tmp_path: Path) -> None:
    planned, _ = plan(python_corpus(write_corpus(tmp_path, files=6)), [2048], 60)
    assert planned.missing == {2048: 60 - len(planned.items)}
    assert 5 < len(planned.items) < 24  # of 24 functions


def test_no_function_at_all_is_unsupported(tmp_path: Path) -> None:
    corpus = python_corpus(write_corpus(tmp_path, lines=60))
    with pytest.raises((UnsupportedError, BadInputError), match=r"no function of 20 lines|short enough"):
        plan(corpus, [1024], 4)


@pytest.mark.parametrize(
    ("asked", "context", "answer", "wanted"),
    [
        (None, 262_144, 4096, [8192, 32768, 65536, 131072, 204800, 258048]),
        (None, 204_800, 4096, [8192, 32768, 65536, 131072, 200_704]),
        (None, 131_072, 4096, [8192, 32768, 65536, 126_976]),
        (None, 8192, 2048, [1536, 3072, 6144]),
        (None, 2048, 512, [1536]),
        ([1024, 2048], 4096, 256, [1024, 2048]),
        ([2048, 1024, 1024], None, 256, [1024, 2048]),
        ([204_800], 204_800, 4096, [200_704]),  # as much of the context as the answer leaves
    ],
)
def test_lengths(asked: list[int] | None, context: int | None, answer: int, wanted: list[int]) -> None:
    assert prompt_lengths(asked, context, answer) == wanted


@pytest.mark.parametrize(
    ("asked", "context", "answer", "why"),
    [
        ([8192], 4096, 256, "8192 tokens is asked, and the model is served with a context of 4096"),
        ([256], 4096, 256, "too short for a question"),
        (None, 1024, 512, "too short for a question"),
        (None, 512, 600, "too short for a question"),
        (None, None, 512, "does not say how long its context is"),
    ],
)
def test_contexts_that_are_too_small(asked: list[int] | None, context: int | None, answer: int, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        prompt_lengths(asked, context, answer)


def test_answer_budget() -> None:
    assert [answer_budget(*case) for case in ((99, 50), (None, None), (None, 2048), (None, 204_800))] == [
        99,
        4096,
        512,
        4096,
    ]


def test_items_are_spread_evenly() -> None:
    assert items_of_lengths([1, 2, 3], 100) == [33, 33, 34]
    assert items_of_lengths([1, 2, 3], 2) == [0, 1, 1]
    assert depths_of_items([0, 50, 100], 6) == [0, 0, 50, 50, 100, 100]
    assert depths_of_items([0, 25, 50, 75, 100], 3) == [0, 50, 100]
    assert depths_of_items([0, 25, 50, 75, 100], 2) == [0, 100]
    assert depths_of_items([0, 100], 1) == [0]


def test_each_depth_gets_the_nearest_function_once() -> None:
    def at(name: str, depth: float) -> Placed:
        return Placed(Function("a.py", name, "", 0, 0, ()), depth)

    there = [at("a", 0.0), at("b", 0.04), at("c", 0.52), at("d", 0.97)]
    pairs, rest = place([0, 0, 50, 100, 100], there, {("a.py", "d")}, 5.0)
    assert [(depth, placed.function.name) for depth, placed in pairs] == [(0, "a"), (0, "b"), (50, "c")]
    assert rest == [100, 100]
