"""What a soak asks and when: requests by number and requests at once by time, both from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

WEIGHTS = {"chat": 6, "whole": 3, "long": 1, "tools": 2, "image": 1, "cancelled": 2}
"""Kinds and their shares: streamed and whole chats, long prompts, tool calls, images, streams that we cut off."""

_LONGEST_SEGMENT_SECONDS = 30.0
_THIRDS = 3


@dataclass(frozen=True)
class Request:
    """``size`` is between 0 and 1: how long the prompt, the answer or the wait before a cancellation is."""

    number: int
    kind: str
    size: float

    @property
    def id(self) -> str:
        """Name of the item."""
        return f"request-{self.number:06}"


@dataclass(frozen=True)
class Plan:
    """A whole soak. ``kinds``: those of :data:`WEIGHTS` that the server can take."""

    seconds: float
    most_requests: int
    kinds: tuple[str, ...]
    seed: int

    def request(self, number: int) -> Request:
        """The request of a number, the same in every run."""
        draw = random.Random(f"{self.seed} request {number}")
        kind = draw.choices(self.kinds, [WEIGHTS[kind] for kind in self.kinds])[0]
        return Request(number, kind, draw.random())

    def requests_at_once(self, at_seconds: float) -> int:
        """How many requests are to be in flight at a time of the soak.

        Each third of the soak has every level equally long, in an order of its own, so that thirds compare.
        """
        levels = sorted(
            {1, *(1 << power for power in range(1, 10) if 1 << power < self.most_requests), self.most_requests}
        )
        third = self.seconds / _THIRDS
        rounds = max(1, round(third / len(levels) / _LONGEST_SEGMENT_SECONDS))
        number = min(int(at_seconds / third), _THIRDS - 1)
        order = levels * rounds
        random.Random(f"{self.seed} third {number}").shuffle(order)
        segment = int((at_seconds - number * third) / third * len(order))
        return order[min(max(segment, 0), len(order) - 1)]
