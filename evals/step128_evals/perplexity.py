"""Perplexity of a text through the endpoint: exp of the mean negative log-likelihood, from prompt log-probabilities."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

from step128_evals.client import Client, ModelInfo
from step128_evals.errors import BadInputError, EvalError


@dataclass(frozen=True)
class PerplexityResult:
    """``chunk_nll[i]`` is the summed negative log-likelihood (nats) of chunk i, ``chunk_positions[i]`` its count."""

    model: str
    definition: str
    context_tokens: int
    bos_token_ids: tuple[int, ...]
    text_tokens: int
    chunk_nll: tuple[float, ...]
    chunk_positions: tuple[int, ...]

    @property
    def nll_per_token(self) -> float:
        """Mean negative log-likelihood of the scored tokens, in nats."""
        return sum(self.chunk_nll) / sum(self.chunk_positions)

    @property
    def perplexity(self) -> float:
        """exp of :attr:`nll_per_token`."""
        return math.exp(self.nll_per_token)


def describe(bos: tuple[int, ...], context_tokens: int) -> str:
    """State in words what is computed, since a perplexity without it compares with nothing."""
    if bos:
        start = f"each chunk starts with the tokenizer's own BOS {list(bos)} and every text token is scored"
    else:
        start = "the tokenizer has no BOS, so the first token of each chunk is not scored"
    return (
        f"text tokenized once, without special tokens; non-overlapping chunks of {context_tokens} tokens in all; "
        f"{start}; a shorter chunk at the end is dropped unless it is the only one; exp of the mean over scored tokens"
    )


def cut_chunks(tokens: list[int], bos: tuple[int, ...], context_tokens: int, max_chunks: int | None) -> list[list[int]]:
    """Cut token ids into chunks as :func:`describe` says; each chunk includes its BOS.

    Raises:
        BadInputError: the context or the text is too short to score anything.
    """
    step = context_tokens - len(bos)
    if step < 2:
        raise BadInputError(f"a context of {context_tokens} tokens leaves nothing to score")
    if len(tokens) + len(bos) < 2:
        raise BadInputError(f"the text has {len(tokens)} tokens, too few to score")
    starts = range(0, max(1, len(tokens) - step + 1), step)
    return [[*bos, *tokens[start : start + step]] for start in starts][:max_chunks]


async def measure_perplexity(
    client: Client,
    model: ModelInfo,
    text: str,
    context_tokens: int,
    max_chunks: int | None,
    concurrency: int,
    on_chunk: Callable[[int, int], None],
) -> PerplexityResult:
    """Score a text.

    Args:
        client: open; the server must be vLLM or have its ``/tokenize`` and ``prompt_logprobs``.
        model: from :meth:`Client.model`.
        text: the text.
        context_tokens: chunk length, BOS included.
        max_chunks: score no more than these; None for all.
        concurrency: requests in flight.
        on_chunk: called with (chunks done, chunks in all).

    Raises:
        BadInputError: the context does not fit the server, or the text is too short.
        EvalError: the server does not return prompt log-probabilities.
    """
    if model.max_context_tokens is not None and context_tokens >= model.max_context_tokens:
        raise BadInputError(
            f"{context_tokens} context tokens do not fit: the server allows {model.max_context_tokens}, "
            f"one of them for the answer. Use --context-tokens {model.max_context_tokens - 1} or less."
        )
    bos = await find_bos(client, model.name)
    tokens = await client.tokenize(model.name, text)
    chunks = cut_chunks(tokens, bos, context_tokens, max_chunks)
    limit, done = asyncio.Semaphore(concurrency), 0

    async def score(chunk: list[int]) -> float:
        nonlocal done
        async with limit:
            nll = await chunk_nll(client, model.name, chunk)
        done += 1
        on_chunk(done, len(chunks))
        return nll

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(score(chunk)) for chunk in chunks]
    return PerplexityResult(
        model=model.name,
        definition=describe(bos, context_tokens),
        context_tokens=context_tokens,
        bos_token_ids=bos,
        text_tokens=len(tokens),
        chunk_nll=tuple(task.result() for task in tasks),
        chunk_positions=tuple(len(chunk) - 1 for chunk in chunks),
    )


async def find_bos(client: Client, model: str) -> tuple[int, ...]:
    """The tokens that the server's tokenizer puts before a text (usually one, or none)."""
    plain = await client.tokenize(model, "a", add_special_tokens=False)
    special = await client.tokenize(model, "a", add_special_tokens=True)
    for length in range(len(special) - len(plain) + 1):
        if special[length : length + len(plain)] == plain:
            return tuple(special[:length])
    raise EvalError(f"the tokenizer's special tokens cannot be told from the text: {plain} became {special}")


async def chunk_nll(client: Client, model: str, chunk: list[int]) -> float:
    """Summed negative log-likelihood (nats) of all tokens of a chunk but the first, each given those before it.

    Raises:
        EvalError: the answer has no log-probability for a token.
    """
    # One generated token is the least that vLLM takes; prompt_logprobs always includes the prompt's own token.
    body = {"model": model, "prompt": chunk, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}
    answer = await client.post("/v1/completions", body)
    with client.explained():
        logprobs = answer["choices"][0].get("prompt_logprobs")
        if not logprobs or len(logprobs) != len(chunk):
            raise EvalError(
                f"{client.root_url} returned {len(logprobs or [])} prompt log-probabilities for {len(chunk)} tokens. "
                "Perplexity needs a server with vLLM's prompt_logprobs."
            )
        return -sum(float(logprobs[i][str(token)]["logprob"]) for i, token in enumerate(chunk) if i > 0)
