"""How an endpoint's thinking is switched on and off: found by trying, since many take a switch and think on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from step128_evals.chat import Answer, ChatRequest, ask_chat, split_reasoning
from step128_evals.client import Client
from step128_evals.errors import EvalError, ServerUnreachableError, UnauthorizedError

_QUESTION = "How many of the whole numbers from 1 to 20 can be divided by 3? Answer with the number."
_HIDDEN_TOKENS = 16
"""So many tokens more than there are characters to read, and something was thought and not shown."""

_THINKS, _DOES_NOT = "it thinks", "it does not think"

Options = dict[str, Any]
"""Fields of the request's body."""

_SWITCHES_ON: tuple[Options, ...] = (
    {},
    {"reasoning_effort": "medium"},
    {"chat_template_kwargs": {"enable_thinking": True, "thinking": True}},
)
_SWITCHES_OFF: tuple[Options, ...] = (
    {},
    {"reasoning_effort": "none"},
    {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}},
)


def thought_of(answer: Answer) -> str:
    """The reasoning of an answer, also where a server left it in the text."""
    if answer.reasoning:
        return answer.reasoning
    if thought := split_reasoning(answer.text)[0]:
        return thought
    head, mark, tail = answer.text.partition("<think>")
    return tail if mark and not head.strip() else ""


def thinks_hidden(answer: Answer) -> bool:
    """Whether more tokens were counted than there is to read: reasoning, or what a parser swallowed."""
    shown = len(answer.text) + sum(len(call["name"]) + len(call["arguments"]) + 80 for call in answer.tool_calls)
    return answer.tokens_counted and answer.tokens > shown + _HIDDEN_TOKENS


def thinks(answer: Answer) -> bool:
    """Whether there was any reasoning, shown or not; for answers to a question without tools."""
    return bool(thought_of(answer).strip()) or bool(answer.reasoning_tokens) or thinks_hidden(answer)


def thinks_openly(answer: Answer) -> bool:
    """Whether reasoning is there to see or counted as such; a lone ``</think>`` may be a mark that leaked."""
    begun = answer.text.lstrip().startswith("<think>")
    return bool(answer.reasoning.strip()) or bool(answer.reasoning_tokens) or begun


def refused(error: EvalError) -> bool:
    """Whether a server said that it does not take a request (400, 422, 501), unlike one that failed to answer it."""
    return getattr(error.__cause__, "status_code", None) in (400, 422, 501)


@dataclass(frozen=True)
class Setting:
    """``options`` None: the endpoint cannot, and ``why`` says what was tried."""

    options: Options | None
    why: str


@dataclass(frozen=True)
class Switch:
    """How to have an endpoint think, and how to keep it from thinking."""

    on: Setting
    off: Setting


async def find_switch(client: Client, model: str, max_tokens: int = 256, effort: str | None = None) -> Switch:
    """Ask one short question with each way that servers have, until one shows thinking and one shows none.

    ``effort``: of reasoning, that is wanted of the thinking; tried before all else.

    Raises:
        EvalError: the question is not answered without any switch either.
    """
    seen: dict[str, str] = {}

    async def outcome(options: Options) -> str:
        """``it thinks``, ``it does not think``, or why there was no answer."""
        key = json.dumps(options)
        if key not in seen:
            request = ChatRequest(
                [{"role": "user", "content": _QUESTION}], max_tokens=max_tokens, stream=False, extra=options
            )
            try:
                answer = await ask_chat(client, model, request)
            except (ServerUnreachableError, UnauthorizedError):
                raise
            except EvalError as error:
                if not options:
                    raise  # the plain question: nothing would work
                seen[key] = str(error)
            else:
                seen[key] = _THINKS if thinks(answer) else _DOES_NOT
        return seen[key]

    async def first(candidates: tuple[Options, ...], wanted: str) -> Setting:
        tried = []
        for options in candidates:
            if (found := await outcome(options)) == wanted:
                return Setting(options, "")
            tried.append(f"asked {f'with {json.dumps(options)}' if options else 'plainly'}: {found}")
        return Setting(None, "; ".join(tried))

    wanted_first: tuple[Options, ...] = ({"reasoning_effort": effort},) if effort else ()
    return Switch(await first(wanted_first + _SWITCHES_ON, _THINKS), await first(_SWITCHES_OFF, _DOES_NOT))
