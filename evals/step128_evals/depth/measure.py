"""One cell: so many requests at once, at one depth, timed one by one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from step128_evals.chat import Answer, ChatRequest, ask_chat
from step128_evals.client import Client
from step128_evals.completion import IGNORE_EOS, complete
from step128_evals.depth.prompts import PromptMaker
from step128_evals.errors import EvalError, ServerUnreachableError, UnauthorizedError
from step128_evals.metrics import foreign_traffic, read_at_rest
from step128_evals.probe import Endpoint
from step128_evals.runs import Item

_WARM_UP_TOKENS = 2048


@dataclass(frozen=True)
class Cell:
    """``kind`` is cold (every prompt is new to the server) or cached (all but its end was asked just before).

    The last generated token is at ``depth_tokens``: the prompt is shorter by ``output_tokens``. At depth 0 the
    prompt is its header alone, and the answer comes on top.
    """

    kind: str
    depth_tokens: int
    concurrency: int
    repeat: int
    output_tokens: int

    @property
    def id(self) -> str:
        """Name of the item."""
        return f"{self.kind}.depth-{self.depth_tokens}.concurrency-{self.concurrency}.repeat-{self.repeat}"

    @property
    def prompt_tokens(self) -> int:
        """Wanted length of the prompt; 0 asks for the header alone."""
        return max(self.depth_tokens - self.output_tokens, 0)


@dataclass
class Meter:
    """Asks the cells; before the first one it warms the server up and finds out whether it takes ``ignore_eos``."""

    client: Client
    endpoint: Endpoint
    prompts: PromptMaker
    most_requests: int
    warm_up_tokens: int = _WARM_UP_TOKENS
    _extra: dict[str, Any] | None = field(default=None, init=False)

    async def measure(self, cell: Cell) -> Item:
        """Ask all requests of a cell at once.

        Raises:
            EvalError: one of them failed, or the server worked for others too.
        """
        if self._extra is None:
            await self._warm_up(cell.output_tokens)
        names = [f"{cell.id} {index}" for index in range(cell.concurrency)]
        if cell.kind == "cached":
            shared = f"shared {cell.id}"
            await self._ask(await self.prompts.make(cell.prompt_tokens, shared, tail="first"), 1)
            prompts = [await self.prompts.make(cell.prompt_tokens, shared, tail=name) for name in names]
        else:
            prompts = [await self.prompts.make(cell.prompt_tokens, name) for name in names]
        before = await read_at_rest(self.client)
        started = time.perf_counter()
        answers = await self._ask_all(prompts, cell.output_tokens)
        seconds = time.perf_counter() - started
        after = await read_at_rest(self.client)
        cached = None
        if before and not after:
            raise EvalError(f"{self.client.root_url} hides its /metrics since the cell began")
        tells = False
        if before and after:
            tells = before.finished_requests is not None or before.generated_tokens is not None
            counted = all(answer.tokens_counted for answer in answers)
            tokens = sum(answer.tokens for answer in answers) if counted else None
            if others := foreign_traffic(before, after, len(answers), tokens):
                raise EvalError(f"not alone on the server, so the times are not its own: {others}")
            if before.cached_prompt_tokens is not None and after.cached_prompt_tokens is not None:
                cached = int(after.cached_prompt_tokens - before.cached_prompt_tokens)
        return Item(
            cell.id,
            "measured",
            data={
                "kind": cell.kind,
                "depth_tokens": cell.depth_tokens,
                "concurrency": cell.concurrency,
                "seconds": seconds,
                "cached_prompt_tokens": cached,
                "others_would_show": tells,
                "requests": [_timing(answer) for answer in answers],
            },
        )

    async def _warm_up(self, output_tokens: int) -> None:
        """Compilation and first allocations are not what is measured."""
        names = [f"warm-up {index}" for index in range(self.most_requests)]
        prompts = [await self.prompts.make(self.warm_up_tokens, name) for name in names]
        for extra in (IGNORE_EOS, {}):
            self._extra = extra
            try:
                await self._ask_all(prompts, output_tokens)
            except (ServerUnreachableError, UnauthorizedError):
                self._extra = None
                raise
            except EvalError:
                if not extra:
                    self._extra = None
                    raise
            else:
                return

    async def _ask_all(self, prompts: Sequence[list[int] | str], max_tokens: int) -> list[Answer]:
        found = await asyncio.gather(*(self._ask(prompt, max_tokens) for prompt in prompts), return_exceptions=True)
        answers = [answer for answer in found if isinstance(answer, Answer)]
        for failure in found:
            if isinstance(failure, BaseException):
                raise failure
        return answers

    async def _ask(self, prompt: list[int] | str, max_tokens: int) -> Answer:
        extra = self._extra or {}
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
            request = ChatRequest(messages, max_tokens=max_tokens, extra=extra)
            return await ask_chat(self.client, self.endpoint.model, request)
        return await complete(self.client, self.endpoint.model, prompt, max_tokens, extra)


def _timing(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "tokens": answer.tokens,
        "tokens_counted": answer.tokens_counted,
        "first_token_seconds": answer.first_token_seconds,
        "seconds": answer.total_seconds,
        "finish_reason": answer.finish_reason,
    }
