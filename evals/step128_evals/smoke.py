"""Does the endpoint work at all: one streamed question, one image, one tool call that nothing forces."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from step128_evals.chat import Answer, ChatRequest, Say, ask_chat
from step128_evals.client import Client
from step128_evals.errors import EvalError, ServerUnreachableError, UnauthorizedError
from step128_evals.metrics import Acceptance, acceptance_between, read_counters

VISION_CAVEAT = (
    "This model's vision tower is not trained: the image shows that the plumbing works, the answer means nothing."
)

_ASKING_WORDS = frozenset(["what", "is", "the", "weather", "in", "how", "like", "today", "now"])

WEATHER_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city."}},
            "required": ["city"],
        },
    },
}


@dataclass(frozen=True)
class SmokeOptions:
    """What to ask. ``max_tokens`` bounds each answer, reasoning included."""

    question: str = "What is the capital of France?"
    image_question: str | None = "What is in this image?"
    tool_question: str = "What is the weather in Paris?"
    max_tokens: int = 256
    reasoning_effort: str | None = None
    vision_plumbing_only: bool = False
    """The vision tower is untrained: say so, and let the image pass with whatever is generated."""

    @property
    def limits(self) -> dict[str, Any]:
        """The options that hold for every answer, by their names in :class:`ChatRequest`."""
        return {"max_tokens": self.max_tokens, "reasoning_effort": self.reasoning_effort}


@dataclass(frozen=True)
class Part:
    """One of the three checks; ``problem`` is None if it passed. The last of ``answers`` is the final one."""

    name: str
    problem: str | None
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class SmokeResult:
    """All checks, and what the server's counters say about the drafts meanwhile (None: nothing was drafted)."""

    model: str
    parts: tuple[Part, ...]
    acceptance: Acceptance | None

    @property
    def passed(self) -> bool:
        """Whether every part passed."""
        return all(part.problem is None for part in self.parts)


async def run_smoke(client: Client, model: str, options: SmokeOptions, say: Say) -> SmokeResult:
    """Run all parts, one after the other; a part that fails does not keep the next from running.

    Args:
        client: open.
        model: name of the served model.
        options: what to ask.
        say: gets text for a person to read, as it arrives.

    Raises:
        ServerUnreachableError, UnauthorizedError: no further part could do better.
    """
    before = await read_counters(client)
    parts = [await _part("question", say, lambda: _question(client, model, options, say))]
    if options.image_question is not None:
        parts.append(await _part("image", say, lambda: _image(client, model, options, say)))
    parts.append(await _part("tool call", say, lambda: _tool_call(client, model, options, say)))
    return SmokeResult(model, tuple(parts), acceptance_between(before, await read_counters(client)))


async def _part(name: str, say: Say, check: Callable[[], Awaitable[Part]]) -> Part:
    try:
        part = await check()
    except (ServerUnreachableError, UnauthorizedError):
        raise
    except EvalError as error:
        part = Part(name, str(error), ())
    for answer in part.answers:
        say(
            f"  [{answer.tokens} tokens, first after {answer.first_token_seconds:.2f} s, "
            f"then {answer.tokens_per_second:.1f} tokens/s]\n"
        )
    say(f"  FAILED: {part.problem}\n" if part.problem else "  ok\n")
    return part


async def _question(client: Client, model: str, options: SmokeOptions, say: Say) -> Part:
    say(f"\nquestion: {options.question}\n")
    request = ChatRequest([{"role": "user", "content": options.question}], **options.limits)
    answer = await ask_chat(client, model, request, say)
    return Part("question", _empty(answer), (answer,))


async def _image(client: Client, model: str, options: SmokeOptions, say: Say) -> Part:
    say(f"\nimage: {options.image_question}\n")
    if options.vision_plumbing_only:
        say(f"({VISION_CAVEAT})\n")
    url = f"data:image/png;base64,{base64.b64encode(draw_picture()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": options.image_question},
    ]
    request = ChatRequest([{"role": "user", "content": content}], **options.limits)
    answer = await ask_chat(client, model, request, say)
    problem = None if options.vision_plumbing_only and answer.tokens else _empty(answer)
    return Part("image", problem, (answer,))


async def _tool_call(client: Client, model: str, options: SmokeOptions, say: Say) -> Part:
    say(f"\ntool call: {options.tool_question}\n")
    messages: list[dict[str, Any]] = [{"role": "user", "content": options.tool_question}]
    first = await ask_chat(client, model, ChatRequest(messages, tools=[WEATHER_TOOL], **options.limits), say)
    if problem := tool_call_problem(first, options.tool_question):
        return Part("tool call", problem, (first,))
    call = first.tool_calls[0]
    weather = json.dumps({"city": json.loads(call["arguments"])["city"], "condition": "sunny", "temperature": 21})
    say(f"  -> {call['name']}({call['arguments']}) = {weather}\n")
    messages = [*messages, first.assistant_message, {"role": "tool", "tool_call_id": call["id"], "content": weather}]
    final = await ask_chat(client, model, ChatRequest(messages, tools=[WEATHER_TOOL], **options.limits), say)
    return Part("tool call", _empty(final), (first, final))


def tool_call_problem(answer: Answer, question: str) -> str | None:
    """Say what is wrong with the first tool call of an answer; None if it asks for a city that the question names."""
    if not answer.tool_calls:
        return f"no tool call; the answer was {answer.text[:200]!r}, finished by {answer.finish_reason!r}"
    call = answer.tool_calls[0]
    if call["name"] != "get_weather":
        return f"called {call['name']!r}; the only tool is 'get_weather'"
    try:
        arguments = json.loads(call["arguments"])
    except json.JSONDecodeError as error:
        return f"the arguments are not JSON ({error}): {call['arguments'][:200]!r}"
    city = arguments.get("city") if isinstance(arguments, dict) else None
    if not isinstance(city, str) or not city.strip():
        return f"the arguments have no city: {call['arguments'][:200]!r}"
    if not _names(question, city):
        return f"asked for the weather in {city!r}, which the question does not name"
    return None


def _names(question: str, city: str) -> bool:
    """Whether the question has all words of the city, in a row, and they are more than its words that ask."""
    asked, named = (re.findall(r"\w+", text.casefold()) for text in (question, city))
    rows = (asked[start : start + len(named)] for start in range(len(asked)))
    return not set(named) <= _ASKING_WORDS and named in rows


def _empty(answer: Answer) -> str | None:
    if answer.text.strip():
        return None
    if answer.tool_calls:
        return f"no answer, but a call of {answer.tool_calls[0]['name']!r}"
    thought = f"{len(answer.reasoning)} characters of reasoning, but " if answer.reasoning else ""
    return f"{thought}no answer in {answer.tokens} tokens, finished by {answer.finish_reason!r}"


def draw_picture() -> bytes:
    """A PNG of 224 x 224 pixels: a red disc and a blue square on white."""
    image = Image.new("RGB", (224, 224), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 20, 110, 110), fill="red")
    draw.rectangle((120, 120, 200, 200), fill="blue")
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
