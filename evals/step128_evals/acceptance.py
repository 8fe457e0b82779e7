"""MTP acceptance by position: the model continues pieces of a text greedily, the server's counters tell the rest."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from step128_evals.client import Client
from step128_evals.errors import BadInputError, EvalError
from step128_evals.metrics import Acceptance, acceptance_between, read_counters


@dataclass(frozen=True)
class AcceptanceResult:
    """``tokens_per_second`` counts generated tokens over the whole time, prompts included, one request at a time."""

    model: str
    prompts: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    acceptance: Acceptance

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second."""
        return self.generated_tokens / self.seconds


def cut_prompts(tokens: list[int], prompts: int, prompt_tokens: int) -> list[list[int]]:
    """Take ``prompts`` pieces of ``prompt_tokens`` tokens, evenly spread over the text, not overlapping.

    Raises:
        BadInputError: the text is too short.
    """
    if len(tokens) < prompts * prompt_tokens:
        raise BadInputError(
            f"the text has {len(tokens)} tokens; {prompts} prompts of {prompt_tokens} need {prompts * prompt_tokens}"
        )
    stride = len(tokens) // prompts
    return [tokens[i * stride : i * stride + prompt_tokens] for i in range(prompts)]


async def measure_acceptance(
    client: Client,
    model: str,
    text: str,
    prompts: int,
    prompt_tokens: int,
    max_tokens: int,
    on_prompt: Callable[[int, int], None],
) -> AcceptanceResult:
    """Continue pieces of a held-out text, one after the other, and read the counters before and after.

    Nothing else may use the server meanwhile: its counters do not tell requests apart.

    Raises:
        EvalError: the server drafted nothing.
    """
    pieces = cut_prompts(await client.tokenize(model, text), prompts, prompt_tokens)
    before = await read_counters(client)
    generated = 0
    started = time.perf_counter()
    for number, piece in enumerate(pieces, start=1):
        body = {"model": model, "prompt": piece, "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
        answer = await client.post("/v1/completions", body)
        with client.explained():
            generated += int(answer["usage"]["completion_tokens"])
        on_prompt(number, len(pieces))
    seconds = time.perf_counter() - started
    acceptance = acceptance_between(before, await read_counters(client))
    if acceptance is None:
        raise EvalError(f"{client.root_url} drafted no tokens: it runs without MTP (or hides its /metrics)")
    return AcceptanceResult(model, prompts, prompt_tokens, generated, seconds, acceptance)
