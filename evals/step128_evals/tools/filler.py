"""Earlier turns of a conversation, so that a scenario is asked at depth: prose and code, so many tokens of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from step128_evals.corpus import prose, python_corpus
from step128_evals.errors import EvalError
from step128_evals.files import sha256
from step128_evals.tokens import TokenCounter

_TURN_TOKENS = 4096
_CHARACTERS_PER_TOKEN = 12
"""More than any tokenizer reaches on these texts: how much text is looked at for one turn."""


@dataclass(frozen=True)
class Filler:
    """``messages`` come before a scenario's own. ``tokens`` counts their texts, without the chat template's marks."""

    messages: tuple[dict[str, Any], ...]
    tokens: int

    @property
    def sha256(self) -> str:
        """Of the texts."""
        return sha256("\0".join(message["content"] for message in self.messages))


async def build_filler(counter: TokenCounter, depth_tokens: int) -> Filler:
    """At most ``depth_tokens`` tokens of earlier turns, in whole lines: the user shows a text, the model takes note.

    Args:
        counter: the endpoint's.
        depth_tokens: at least 1.

    Raises:
        EvalError: the texts of this machine do not suffice.
    """
    sources = [prose(), "\n".join(file.text for file in python_corpus().files)]
    at = [0, 0]
    messages: list[dict[str, Any]] = []
    used = 0
    while depth_tokens > used:
        which = len(messages) // 2 % 2
        want = min(_TURN_TOKENS, depth_tokens - used)
        window = sources[which][at[which] : at[which] + want * _CHARACTERS_PER_TOKEN]
        piece = await counter.longest_prefix(window, want)
        if not piece:
            break
        at[which] += len(piece)
        used += await counter.count(piece)
        messages += [
            {"role": "user", "content": f"Keep this text for later, there is nothing to do yet.\n\n{piece}"},
            {"role": "assistant", "content": "I have read it and keep it in mind."},
        ]
    if used < depth_tokens * 0.9:
        raise EvalError(f"the texts of this machine give {used} tokens; a depth of {depth_tokens} needs more")
    return Filler(tuple(messages), used)
