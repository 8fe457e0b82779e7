"""One chat answer, streamed or whole, with its reasoning, its tool calls and its times."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from step128_evals.client import Client
from step128_evals.errors import EvalError

Say = Callable[[str], None]
SEED = 42

_THOUGHT = re.compile(r"\A\s*(?:<think>)?(?P<thought>.*?)</think>(?:[^\S\n]*\n)*", re.DOTALL)


@dataclass(frozen=True)
class ChatRequest:
    """What to ask; greedy and with a fixed seed. None leaves a field to the server.

    ``max_tokens`` bounds the answer, reasoning included. ``reasoning_effort``: low, medium or high (``none`` where a
    server has it). ``extra`` goes into the body as it is.
    """

    messages: list[dict[str, Any]]
    max_tokens: int = 256
    tools: list[dict[str, Any]] | None = None
    tool_choice: str = "auto"
    reasoning_effort: str | None = None
    temperature: float = 0.0
    seed: int | None = SEED
    stream: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    def body(self, model: str) -> dict[str, Any]:
        """The arguments of the official client's ``create``."""
        body: dict[str, Any] = {
            "model": model,
            "messages": self.messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": self.stream,
        }
        if self.seed is not None:
            body["seed"] = self.seed
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        if self.tools:
            body |= {"tools": self.tools, "tool_choice": self.tool_choice}
        if self.reasoning_effort:
            body["reasoning_effort"] = self.reasoning_effort
        return body | ({"extra_body": self.extra} if self.extra else {})


@dataclass(frozen=True)
class Answer:
    """One answer and its times.

    ``tokens`` counts generated tokens, reasoning included, as the server counts them (without its count: the chunks of
    the stream, and ``tokens_counted`` is false); ``reasoning_tokens`` is there where the server says it. An answer that
    is not streamed has its first token when it has its last, and so has one that shows nothing. Each of ``tool_calls``
    holds ``id``, ``name`` and ``arguments``.
    """

    text: str
    reasoning: str
    tool_calls: tuple[dict[str, str], ...]
    finish_reason: str
    tokens: int
    first_token_seconds: float
    total_seconds: float
    prompt_tokens: int | None = None
    tokens_counted: bool = True
    reasoning_tokens: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first, over the time after the first."""
        decode_seconds = self.total_seconds - self.first_token_seconds
        return (self.tokens - 1) / decode_seconds if decode_seconds > 0 and self.tokens > 1 else 0.0

    @property
    def assistant_message(self) -> dict[str, Any]:
        """The answer as a message of the next request's conversation (reasoning is not sent back)."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text or None}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": call["arguments"]},
                }
                for call in self.tool_calls
            ]
        return message


def split_reasoning(text: str) -> tuple[str, str]:
    """Part (reasoning, answer) of a text in which a server left the reasoning, ended by ``</think>``.

    Blank lines between the two go; the indentation of the answer's first line stays.
    """
    found = _THOUGHT.match(text)
    return (found["thought"].strip(), text[found.end() :]) if found else ("", text)


async def ask_chat(client: Client, model: str, request: ChatRequest, say: Say = lambda _: None) -> Answer:
    """Ask, streamed or not as the request says.

    Args:
        client: open.
        model: name of the served model.
        request: what to ask.
        say: gets reasoning and text as they arrive.

    Raises:
        EvalError: the request was refused, the stream broke off, or the answer does not follow the API.
    """
    return await (_streamed if request.stream else _whole)(client, model, request, say)


async def _whole(client: Client, model: str, request: ChatRequest, say: Say) -> Answer:
    started = time.perf_counter()
    with client.explained():
        create: Any = client.openai.chat.completions.create  # its types know only OpenAI's own models and options
        answer = await create(**request.body(model))
        seconds = time.perf_counter() - started
        if not answer.choices or not answer.choices[0].finish_reason:
            raise EvalError(f"{client.root_url} sent an answer without a choice or its finish reason")
        choice, usage = answer.choices[0], answer.usage
        message = choice.message
        calls = [
            {"id": call.id or "", "name": call.function.name or "", "arguments": call.function.arguments or ""}
            for call in message.tool_calls or []
        ]
        say(_thought(message) + (message.content or "") + "\n")
        return Answer(
            text=message.content or "",
            reasoning=_thought(message),
            tool_calls=tuple(calls),
            finish_reason=choice.finish_reason,
            tokens=_number(usage, "completion_tokens") or 0,
            first_token_seconds=seconds,
            total_seconds=seconds,
            prompt_tokens=_number(usage, "prompt_tokens"),
            tokens_counted=_number(usage, "completion_tokens") is not None,
            reasoning_tokens=_reasoning_tokens(usage),
        )


async def _streamed(client: Client, model: str, request: ChatRequest, say: Say) -> Answer:
    parts = _Parts(say)
    started = time.perf_counter()
    first = last = started
    chunks = 0
    with client.explained():
        create: Any = client.openai.chat.completions.create
        stream = await create(**request.body(model))
        async with stream:
            async for chunk in stream:
                if chunk.usage:
                    parts.usage = chunk.usage
                for choice in chunk.choices[:1]:
                    parts.finish_reason = choice.finish_reason or parts.finish_reason
                    # The chunk that ends an answer counts too: its last tokens may show nothing, such as the EOS.
                    last = time.perf_counter()
                    if parts.add(choice.delta):
                        first = first if chunks else last
                        chunks += 1
    say("\n")
    counted = _number(parts.usage, "completion_tokens")
    if not parts.finish_reason:
        raise EvalError(f"the stream ended without a finish reason after {len(parts.text)} characters")
    return Answer(
        text=parts.text,
        reasoning=parts.reasoning,
        tool_calls=tuple(parts.calls[index] for index in sorted(parts.calls)),
        finish_reason=parts.finish_reason,
        tokens=chunks if counted is None else counted,
        first_token_seconds=(first if chunks else last) - started,
        total_seconds=last - started,
        prompt_tokens=_number(parts.usage, "prompt_tokens"),
        tokens_counted=counted is not None,
        reasoning_tokens=_reasoning_tokens(parts.usage),
    )


class _Parts:
    """A streamed answer as far as it has come."""

    def __init__(self, say: Say) -> None:
        self.text = self.reasoning = self.finish_reason = ""
        self.calls: dict[int, dict[str, str]] = {}
        self.usage: Any = None
        self._say = say

    def add(self, delta: Any) -> bool:
        """Take one delta in; returns whether it held anything generated."""
        for part in delta.tool_calls or []:
            # A part without an index, as some servers send them, goes on with the last call unless it has an id.
            last = max(self.calls, default=-1)
            index = part.index if part.index is not None else last + 1 if part.id or last < 0 else last
            call = self.calls.setdefault(index, {"id": "", "name": "", "arguments": ""})
            call["id"] = part.id or call["id"]
            if part.function:
                call["name"] += part.function.name or ""
                call["arguments"] += part.function.arguments or ""
        thought, content = _thought(delta), delta.content or ""
        if thought and not self.reasoning:
            self._say("(thinking) ")
        if content and self.reasoning and not self.text:
            self._say("\n(answer) ")
        self._say(thought + content)
        self.reasoning += thought
        self.text += content
        return bool(thought or content or delta.tool_calls)


def _thought(message: Any) -> str:
    """Reasoning has no field in OpenAI's API: vLLM says ``reasoning``, llama.cpp and SGLang ``reasoning_content``."""
    return next(_values(message, "reasoning", "reasoning_content"), "")


def _reasoning_tokens(usage: Any) -> int | None:
    return _number(getattr(usage, "completion_tokens_details", None), "reasoning_tokens")


def _number(usage: Any, name: str) -> int | None:
    """A count of a usage, which some servers leave out or send as null."""
    value = getattr(usage, name, None)
    return value if isinstance(value, int) else None


def _values(message: Any, *names: str) -> Iterator[str]:
    return (value for name in names if isinstance(value := getattr(message, name, None), str) and value)
