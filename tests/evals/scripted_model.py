"""A language model of which everything is known: the oracle's completions for the tests of perplexity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from oracle import Reply

BOS = 1
NATS = 0.25
"""A token at index i of its request costs i times this."""


def ids_of(text: str) -> list[int]:
    """One token a character."""
    return [10 + ord(character) for character in text]


@dataclass
class ScriptedModel:
    """Assign :meth:`respond` to an oracle. ``dialect``: prompt_logprobs, echo, or None.

    ``logprob(ids, i)``: of the token at index i. ``others``: log-probabilities of tokens that stand beside it.
    """

    dialect: str | None = "prompt_logprobs"
    bos: bool = True
    tokenizer: bool = True
    most_top: int = 20
    logprob: Callable[[list[int], int], float | None] = lambda ids, i: -NATS * i
    others: tuple[tuple[int, float], ...] = ((7, 0.0),)
    fail: Callable[[list[int]], Reply | None] = lambda ids: None

    def respond(self, path: str, body: dict[str, Any]) -> Reply | None:
        if path == "/tokenize":
            ids = ids_of(body["prompt"]) if "prompt" in body else []
            special = [BOS] if body.get("add_special_tokens") and self.bos else []
            return Reply(body={"tokens": special + ids}) if self.tokenizer else Reply("no such path", status=404)
        if path == "/v1/completions":
            return self._complete(body)
        return None

    def _complete(self, body: dict[str, Any]) -> Reply | None:
        prompt = body["prompt"]
        ids = [BOS, *ids_of(prompt)] if isinstance(prompt, str) else prompt
        if failure := self.fail(ids):
            return failure
        wanted = body.get("prompt_logprobs", body.get("logprobs", 0))
        if wanted > self.most_top:
            return Reply(f"{wanted} is greater than max allowed: {self.most_top}", status=400)
        if self.dialect == "prompt_logprobs" and "prompt_logprobs" in body:
            return Reply(body={"choices": [{"text": "x", "prompt_logprobs": self._rows(ids, wanted)}]})
        if self.dialect == "echo" and body.get("echo"):
            return Reply(body={"choices": [{"text": "x", "logprobs": self._lists(ids, wanted)}]})
        return None

    def _top(self, ids: list[int], i: int, wanted: int) -> dict[int, float]:
        """The likeliest, and the token itself if it is not among them, as vLLM gives them."""
        own = self.logprob(ids, i)
        candidates = dict(self.others) | ({} if own is None else {ids[i]: own})
        top = dict(sorted(candidates.items(), key=lambda entry: -entry[1])[:wanted])
        return ({} if own is None else {ids[i]: own}) | top

    def _rows(self, ids: list[int], wanted: int) -> list[Any]:
        rows = [
            {str(token): {"logprob": logprob} for token, logprob in self._top(ids, i, wanted).items()}
            for i in range(len(ids))
        ]
        return [None, *rows[1:]]

    def _lists(self, ids: list[int], wanted: int) -> dict[str, Any]:
        """One generated token comes after the prompt's."""
        numbers = range(1, len(ids))
        return {
            "tokens": [*map(str, ids), "generated"],
            "token_logprobs": [None, *(self.logprob(ids, i) for i in numbers), -9.0],
            "top_logprobs": [
                None,
                *({str(t): p for t, p in self._top(ids, i, wanted).items()} for i in numbers),
                {"generated": -9.0},
            ],
        }
