"""Plan a run of the corrected mode: which function is asked about in which haystack, before anything is asked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from step128_evals.chat import ChatRequest, ask_chat
from step128_evals.client import Client
from step128_evals.errors import UnsupportedError
from step128_evals.needle.functions import Function
from step128_evals.needle.haystack import Haystack, Placed, build_haystack
from step128_evals.needle.placing import depths_of_items, items_of_lengths, place
from step128_evals.needle.question import question
from step128_evals.needle.segments import Shelf
from step128_evals.tokens import TokenCounter

MAX_HAYSTACKS = 24
"""Of one length: a short haystack has few functions, so that short lengths take several."""

MOST_TOLERANCE_PERCENT = 5.0
"""How far a function may stand from the depth that it is asked for; with close depths, half their distance."""

_UNKNOWN_TEMPLATE_TOKENS = 128
_QUESTION_SLACK_TOKENS = 100  # what signature, name and file name add to a question; whose add more are not asked
_JOINT_TOKENS = 8  # tokens may join, or part, where haystack, question and template meet
_ESTIMATE_SHARE = 0.9  # of a length, where tokens are only estimated


@dataclass(frozen=True)
class PlannedItem:
    """``length_tokens`` limits ``counted_tokens``, the whole prompt. ``depth_percent`` is the wanted depth, from which
    ``placed.depth`` is off by the plan's tolerance at most."""

    length_tokens: int
    depth_percent: int
    haystack: Haystack
    placed: Placed
    counted_tokens: int

    @property
    def id(self) -> str:
        """Names the question: the same in two runs only if they ask about the same function at the same place."""
        function = self.placed.function
        return f"{self.length_tokens}:{self.depth_percent}%:{function.file}:{function.name}"


@dataclass(frozen=True)
class Plan:
    """``missing``: for how many items there was no function near enough to its depth, by length."""

    items: tuple[PlannedItem, ...]
    missing: dict[int, int]
    tolerance_percent: float


async def template_tokens(client: Client, model: str, counter: TokenCounter) -> int:
    """How many tokens the server's chat template adds to a message, by one tiny request."""
    content = "Hello"
    answer = await ask_chat(client, model, ChatRequest([{"role": "user", "content": content}], 1, stream=False))
    if answer.prompt_tokens is None:
        return _UNKNOWN_TEMPLATE_TOKENS
    return max(0, answer.prompt_tokens - await counter.count(content))


async def plan_items(
    shelf: Shelf,
    counter: TokenCounter,
    lengths: Sequence[int],
    depths: Sequence[int],
    items: int,
    lines: int,
    overhead_tokens: int,
) -> Plan:
    """Spread the items over lengths and depths, and find a function for each.

    Args:
        shelf: the corpus's files.
        counter: counts tokens.
        lengths: of prompts, in tokens; never exceeded.
        depths: in percent, ascending, each once.
        items: how many in all; each asks about another function.
        lines: asked of each function.
        overhead_tokens: of the chat template.

    Raises:
        BadInputError: the corpus is too small.
        UnsupportedError: a length is too short for any function.
    """
    empty = question(Function("", "", "", 0, 0, ()), lines)
    steps = [right - left for left, right in itertools.pairwise(depths)]
    tolerance = min([MOST_TOLERANCE_PERCENT, *(step / 2 for step in steps)])
    planner = _Planner(
        shelf,
        counter,
        lines,
        overhead_tokens + _JOINT_TOKENS,
        question_tokens=await counter.count(empty) + _QUESTION_SLACK_TOKENS,
        tolerance_percent=tolerance,
    )
    for length, share in zip(lengths, items_of_lengths(lengths, items), strict=True):
        await planner.plan_length(length, depths_of_items(depths, share))
    return Plan(tuple(planner.items), planner.missing, tolerance)


@dataclass
class _Planner:
    shelf: Shelf
    counter: TokenCounter
    lines: int
    overhead_tokens: int
    question_tokens: int
    tolerance_percent: float
    position: int = 0
    items: list[PlannedItem] = field(default_factory=list)
    missing: dict[int, int] = field(default_factory=dict)

    async def plan_length(self, length: int, wanted: list[int]) -> None:
        share = 1.0 if self.counter.exact else _ESTIMATE_SHARE
        limit = int(length * share) - self.overhead_tokens
        for _ in range(MAX_HAYSTACKS):
            if not wanted:
                return
            wanted = await self.plan_haystack(length, limit, wanted)
        if not any(item.length_tokens == length for item in self.items):
            raise UnsupportedError(
                f"unsupported: prompts of {length} tokens have no function of {self.lines} lines at the wanted depths. "
                "Longer prompts: --lengths; fewer lines: --lines."
            )
        if wanted:
            self.missing[length] = len(wanted)

    async def plan_haystack(self, length: int, limit: int, wanted: list[int]) -> list[int]:
        """See what one more haystack has to offer; returns the depths still wanted."""
        budget = limit - self.question_tokens
        haystack, self.position = await build_haystack(self.shelf, self.counter, budget, self.position)
        used = {(item.placed.function.file, item.placed.function.name) for item in self.items}
        pairs, rest = place(wanted, haystack.placed, used, self.tolerance_percent)
        for depth, placed in pairs:
            tokens = haystack.tokens + await self.counter.count(question(placed.function, self.lines))
            if tokens <= limit:
                self.items.append(PlannedItem(length, depth, haystack, placed, tokens + self.overhead_tokens))
            else:
                rest.append(depth)
        return sorted(rest)
