"""One streamed chat answer, with its tool calls and its times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from step128_evals.client import Client
from step128_evals.errors import EvalError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """One streamed answer and its times. ``tokens`` counts generated tokens, reasoning included."""

    text: str
    reasoning: str
    tool_calls: tuple[dict[str, str], ...]
    finish_reason: str
    tokens: int
    first_token_seconds: float
    total_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first, over the time after the first."""
        decode_seconds = self.total_seconds - self.first_token_seconds
        return (self.tokens - 1) / decode_seconds if decode_seconds > 0 and self.tokens > 1 else 0.0


async def stream_chat(
    client: Client,
    model: str,
    messages: list[dict[str, Any]],
    say: Say,
    max_tokens: int = 256,
    reasoning_effort: str | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> Answer:
    """Ask greedily, streamed.

    Args:
        client: open.
        model: name of the served model.
        messages: the conversation, as the API takes it.
        say: gets reasoning and text as they arrive.
        max_tokens: bound of the answer, reasoning included.
        reasoning_effort: ``low``, ``medium`` or ``high``; None leaves it to the chat template.
        tools: offered to the model, which may call them or not.

    Raises:
        EvalError: the request was refused, or the stream broke off.
    """
    extra: dict[str, Any] = {"tools": tools, "tool_choice": "auto"} if tools else {}
    if reasoning_effort:
        extra["reasoning_effort"] = reasoning_effort
    text, reasoning, finish_reason, tokens, chunks = "", "", "", 0, 0
    calls: dict[int, dict[str, str]] = {}
    started = time.perf_counter()
    first = last = started
    with client.explained():
        create: Any = client.openai.chat.completions.create  # its types know only OpenAI's own models and options
        stream = await create(
            model=model,
            messages=messages,
            max_tokens=max_tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            **extra,
        )
        async for chunk in stream:
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
            if not chunk.choices:
                continue
            choice = chunk.choices[0]
            finish_reason = choice.finish_reason or finish_reason
            thought = getattr(choice.delta, "reasoning", None) or getattr(choice.delta, "reasoning_content", None) or ""
            if thought or choice.delta.content or choice.delta.tool_calls:
                last = time.perf_counter()
                first = first if chunks else last
                chunks += 1
            for part in choice.delta.tool_calls or []:
                call = calls.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
                call["id"] = part.id or call["id"]
                if part.function:
                    call["name"] += part.function.name or ""
                    call["arguments"] += part.function.arguments or ""
            content = choice.delta.content or ""
            if thought and not reasoning:
                say("(thinking) ")
            if content and reasoning and not text:
                say("\n(answer) ")
            say(thought + content)
            reasoning += thought
            text += content
    say("\n")
    if not finish_reason:
        raise EvalError(f"the stream ended without a finish reason after {len(text)} characters")
    tool_calls = tuple(calls[index] for index in sorted(calls))
    return Answer(text, reasoning, tool_calls, finish_reason, tokens or chunks, first - started, last - started)
