"""What a window's scores are, whoever computes them: an endpoint over HTTP, or transformers on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from step128_evals.perplexity.windows import Window
from step128_evals.probe import Endpoint

Label = int | str
"""A token's name: its id, or its text where the endpoint gives no ids."""

Top = dict[Label, float]
"""Log-probabilities (nats) of a position's likeliest tokens, the likeliest first."""


@dataclass(frozen=True)
class Scores:
    """Of the scored positions of one window, in order: ``tokens`` are the text's own, ``logprobs`` theirs in nats.

    ``top`` holds the likeliest tokens of each position; empty if none were asked for.
    """

    tokens: tuple[Label, ...]
    logprobs: tuple[float, ...]
    top: tuple[Top, ...] = ()


class Scorer(Protocol):
    """Scores windows of one model."""

    endpoint: Endpoint

    @property
    def limit_tokens(self) -> int | None:
        """The longest window; None if unknown."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether :meth:`tokenize` works; else windows are pieces of text."""

    @property
    def settings(self) -> dict[str, str]:
        """What decides the figures besides text and windows, for the manifest."""

    async def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""

    async def usual_prefix(self) -> int | None:
        """The id of the tokenizer's BOS token, else of its EOS token, used or not; None if it cannot be found out."""

    async def score(self, window: Window, top_k: int) -> Scores:
        """Score a window; ``top_k`` 0 asks for no likeliest tokens.

        Raises:
            EvalError: no log-probability for a token, or another failure of the endpoint.
        """
