"""Right answers to the scenarios of ``tools``, derived from what they expect, and ways to spoil them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

from oracle import Reply

from step128_evals.tools.scenarios import Scenario, Step, load_scenarios

SCENARIOS = load_scenarios()
BY_ID = {scenario.id: scenario for scenario in SCENARIOS}
THOUGHT = "The user wants something; let me see which function fits."
PROMPT_OF_TOOLS = Reply(
    body={
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "6"}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 200, "completion_tokens": 1, "total_tokens": 201},
    }
)
"""The oracle counts words of messages only; this server puts the tools into the prompt too."""
_ids = count()

Spoil = Callable[[Scenario, Step, Reply], Reply]


def example(expected: Any) -> Any:
    """A JSON value that fits what is expected."""
    if isinstance(expected, dict):
        name, operand = next(iter(expected.items())) if len(expected) == 1 else ("", None)
        if name in ("$any_case", "$contains"):
            return operand
        if name == "$one_of":
            return example(operand[0])
        if name == "$set":
            return [example(value) for value in reversed(operand)]
        optional = {key for key, value in expected.items() if isinstance(value, dict) and "$optional" in value}
        return {key: example(value) for key, value in expected.items() if key not in optional}
    return [example(value) for value in expected] if isinstance(expected, list) else expected


def place(messages: list[dict[str, Any]]) -> tuple[Scenario, Step] | None:
    """Which scenario a conversation is of, and at which step it is."""
    for scenario in SCENARIOS:
        first = scenario.steps[0].user
        for position, message in enumerate(messages):
            if message["role"] == "user" and message["content"] == first:
                done = sum(later["role"] == "assistant" for later in messages[position:])
                return scenario, scenario.steps[done]
    return None


def right(step: Step) -> Reply:
    if step.calls:
        calls = tuple((call.name, json.dumps(example(call.arguments), ensure_ascii=False)) for call in step.calls)
        return Reply(tool_calls=calls, call_ids=tuple(f"call-{next(_ids)}" for _ in calls))
    return Reply("Here you are: " + ", ".join(alternatives[0] for alternatives in step.answer) + ".")


def perfect(spoil: Spoil = lambda _scenario, _step, reply: reply) -> Callable[[str, dict[str, Any]], Reply | None]:
    """An oracle's ``respond``: thinks unless told not to, and knows everything, spoilt as a test wants it."""

    def respond(path: str, body: dict[str, Any]) -> Reply | None:
        if path != "/v1/chat/completions":
            return None
        if body["max_tokens"] == 1 and body.get("tools"):
            return PROMPT_OF_TOOLS
        thought = "" if body.get("reasoning_effort") == "none" else THOUGHT
        found = place(body["messages"])
        if found is None:
            return Reply("6", thought)
        scenario, step = found
        return spoil(scenario, step, replace(right(step), reasoning=thought))

    return respond


def with_arguments(reply: Reply, *arguments: str) -> Reply:
    """The same calls with other arguments, as text."""
    names = [name for name, _ in reply.tool_calls]
    return replace(reply, tool_calls=tuple(zip(names, arguments, strict=True)))
