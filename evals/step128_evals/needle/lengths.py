"""Which prompt lengths are asked, within what the endpoint's context holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from step128_evals.errors import UnsupportedError

LADDER = tuple(thousands * 1024 for thousands in (8, 32, 64, 128, 200, 256, 512, 1024))
SHORTEST_TOKENS = 1024
"""A shorter prompt has no room for a question and two functions."""

MAX_ANSWER_TOKENS = 4096


def answer_budget(asked: int | None, context_tokens: int | None) -> int:
    """Tokens of an answer, reasoning included: as asked, or 4096, in a small context a quarter of it."""
    if asked is not None:
        return asked
    return MAX_ANSWER_TOKENS if context_tokens is None else min(MAX_ANSWER_TOKENS, max(1, context_tokens // 4))


def prompt_lengths(asked: Sequence[int] | None, context_tokens: int | None, answer_tokens: int) -> list[int]:
    """Prompt lengths in tokens, ascending: chat template, haystack and question together.

    Without ``asked``: the rungs of :data:`LADDER` below the full prompt, and the full one, which is the context less
    the answer's budget; in a context smaller than the ladder, that and its halves. An asked length that fits into the
    context but leaves no room for the answer becomes the full one: ``200k`` on a server with a context of 200k.

    Raises:
        UnsupportedError: the context is too small, or the server does not say what it is and no lengths are asked.
    """
    if context_tokens is None:
        if asked is None:
            raise UnsupportedError(
                "unsupported: the server does not say how long its context is. Name lengths that it has, "
                "--lengths 8k,32k for instance."
            )
        return _checked(sorted(set(asked)))
    full = context_tokens - answer_tokens
    if asked is None:
        rungs = list(takewhile(lambda rung: rung < 0.9 * full, LADDER)) or [full // 4, full // 2]
        return _checked([*(rung for rung in rungs if rung >= SHORTEST_TOKENS), full])
    too_long = [length for length in asked if length > context_tokens]
    if too_long:
        raise UnsupportedError(
            f"unsupported: a length of {max(too_long)} tokens is asked, and the model is served with a context of "
            f"{context_tokens}. Leave it out of --lengths, or serve the model with more."
        )
    return _checked(sorted({min(length, full) for length in asked}))


def _checked(lengths: list[int]) -> list[int]:
    if lengths[0] < SHORTEST_TOKENS:
        raise UnsupportedError(
            f"unsupported: a prompt of {lengths[0]} tokens (context less answer) is too short for a question and two "
            f"functions; {SHORTEST_TOKENS} are needed. A smaller answer budget: --max-tokens N."
        )
    return lengths
