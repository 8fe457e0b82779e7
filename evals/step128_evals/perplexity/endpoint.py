"""Scores over HTTP, in the dialects of prompt log-probabilities: vLLM's ``prompt_logprobs`` and OpenAI's ``echo``."""

from __future__ import annotations

import json
import math
from typing import Any

from step128_evals.client import Client
from step128_evals.errors import EvalError, UnsupportedError
from step128_evals.perplexity.scoring import Label, Scores, Top
from step128_evals.perplexity.windows import Window
from step128_evals.probe import Endpoint
from step128_evals.tokens import tokenize_with

PROMPT_LOGPROBS, ECHO = "prompt_logprobs", "echo"


class EndpointScorer:
    """Of an endpoint with ``prompt_logprobs`` in either dialect."""

    def __init__(self, client: Client, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._client = client
        self._dialect = endpoint.how("prompt_logprobs")

    @property
    def limit_tokens(self) -> int | None:
        """One token less than the context: servers generate at least one."""
        return self.endpoint.max_context_tokens and self.endpoint.max_context_tokens - 1

    @property
    def has_tokenizer(self) -> bool:
        """Whether it has ``/tokenize``."""
        return self.endpoint.can("tokenize")

    @property
    def settings(self) -> dict[str, str]:
        """The dialect."""
        return {"dialect": self._dialect}

    async def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        """By the server's own tokenizer."""
        dialect = self.endpoint.how("tokenize")
        return await tokenize_with(self._client, dialect, self.endpoint.model, text, add_special_tokens)

    async def usual_prefix(self) -> int | None:
        """From ``/tokenizer_info``, which vLLM has if started with --enable-tokenizer-info-endpoint."""
        try:
            info = json.loads(await self._client.get_text("/tokenizer_info"))
            text = info.get("bos_token") or info["eos_token"]
            ids = await self.tokenize(text["content"] if isinstance(text, dict) else text, False)
        except (EvalError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return ids[0] if len(ids) == 1 else None

    async def require_top(self, top_k: int) -> None:
        """Ask for one tiny prompt whether the endpoint gives so many likeliest tokens.

        Raises:
            UnsupportedError: it does not.
        """
        remedy = (
            f"Pass a smaller --top-k; vLLM gives as many as its --max-logprobs says, 20 by default "
            f"(start it with --max-logprobs {top_k})."
        )
        wanted = f"the {top_k} likeliest tokens of each position"
        try:
            scores = await self.score(Window("Hello world, hello", 1), top_k)
        except UnsupportedError:
            raise
        except EvalError as error:
            raise UnsupportedError(f"unsupported: {wanted}: {error}. {remedy}") from error
        most = max((len(top) for top in scores.top), default=0)
        if most < top_k:
            raise UnsupportedError(f"unsupported: {wanted}: only {most} come. {remedy}")

    async def score(self, window: Window, top_k: int) -> Scores:
        """One request; see :class:`Scorer`."""
        # One generated token is the least that vLLM takes; its prompt_logprobs always include the prompt's own token.
        asked: dict[str, Any] = {"prompt_logprobs": max(1, top_k)}
        if self._dialect == ECHO:
            asked = {"echo": True, "logprobs": max(1, top_k)}
        body = {"model": self.endpoint.model, "prompt": window.prompt, "max_tokens": 1, "temperature": 0.0, **asked}
        answer = await self._client.post("/v1/completions", body)
        with self._client.explained():
            read = _read_echo if self._dialect == ECHO else _read_prompt_logprobs
            try:
                entries = read(answer, window)
            except (ValueError, AttributeError) as error:
                raise TypeError(f"in its log-probabilities: {error}") from error
        scored = entries[window.first_scored :]
        for number, (_, logprob, _) in enumerate(scored, window.first_scored):
            if logprob is None or not math.isfinite(logprob):
                raise EvalError(f"{self._client.root_url} gave no log-probability ({logprob}) for token {number}")
        return Scores(
            tuple(token for token, _, _ in scored),
            tuple(float(logprob) for _, logprob, _ in scored if logprob is not None),
            tuple(_likeliest(top, top_k) for _, _, top in scored) if top_k else (),
        )


_Entry = tuple[Label, float | None, Top]
"""A token of the prompt, its log-probability, and those of the likeliest in its place."""


def _read_prompt_logprobs(answer: dict[str, Any], window: Window) -> list[_Entry]:
    """vLLM's: per position a map from id to ``{"logprob":, ...}``; without ids its first key is the prompt's token."""
    rows = answer["choices"][0].get("prompt_logprobs") or []
    ids = [] if isinstance(window.prompt, str) else window.prompt
    if ids and len(rows) != len(ids):
        raise EvalError(f"the endpoint returned {len(rows)} prompt log-probabilities for {len(ids)} tokens")
    entries: list[_Entry] = []
    for number, row in enumerate(rows):
        top: Top = {int(token): float(entry["logprob"]) for token, entry in (row or {}).items()}
        token = ids[number] if ids else next(iter(top), -1)
        entries.append((token, top.get(token), top))
    return entries


def _read_echo(answer: dict[str, Any], window: Window) -> list[_Entry]:
    """OpenAI's: parallel lists over prompt and answer; tokens by their text, so equal texts fall together."""
    logprobs = answer["choices"][0].get("logprobs") or {}
    own, texts = logprobs["token_logprobs"], logprobs["tokens"]
    tops = logprobs.get("top_logprobs") or [None] * len(own)
    count = len(window.prompt)
    if isinstance(window.prompt, str):
        count = len(own) - int((answer.get("usage") or {}).get("completion_tokens", 1))
    if not len(own) == len(texts) == len(tops) or len(own) < count:
        raise EvalError(f"the endpoint returned {len(own)} log-probabilities for {count} tokens of the prompt")
    entries: list[_Entry] = []
    for number in range(count):
        logprob = own[number]
        top: Top = {str(token): float(value) for token, value in (tops[number] or {}).items()}
        entries.append((str(texts[number]), None if logprob is None else float(logprob), top))
    return entries


def _likeliest(top: Top, top_k: int) -> Top:
    return dict(sorted(top.items(), key=lambda entry: -entry[1])[:top_k])
