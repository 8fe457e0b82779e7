"""Generated conversations with tools: one call, several at once, chains, failures, none; and an agent reading code.

They are rendered by the checkpoint's own chat template, so the calls are in the format that the model was trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import count
from typing import Any

from step128_checkpoint.calibration.building import library
from step128_checkpoint.calibration.building.conversations import assistant, user
from step128_checkpoint.calibration.building.documents import Document, Message
from step128_checkpoint.calibration.building.tools import TOOLS, Tool, Values, function_schema, schema, written_name
from step128_checkpoint.calibration.building.words import listed

_SYSTEM_PROMPTS = (
    "You are a helpful assistant with access to tools.",
    "Use the tools you are given; do not make up results.",
    "You are an agent. Work step by step, call tools where they help, and report what you found.",
)
_FAILURES = ("timeout after 30 s", "503 service unavailable", "rate limit exceeded, retry later", "not found")


def tool_conversations(rng: random.Random) -> Iterator[Document]:
    """Conversations with tools of every kind, without end."""
    functions = library.functions(rng)
    for number in count(1):
        offered = [function_schema(next(functions)) for _ in range(rng.choice((0, 0, 1, 2, 4)))]
        kind = rng.random()
        if kind < 0.3:
            turns, tools = _answered(rng, calls=1)
        elif kind < 0.5:
            turns, tools = _answered(rng, calls=rng.randint(2, 3))
        elif kind < 0.6:
            turns, tools = _retried(rng)
        elif kind < 0.68:
            turns, tools = _not_needed(rng)
        elif kind < 0.84:
            turns, tools = _reading_code(rng)
        else:
            turns, tools = _called_function(rng, next(functions))
        tools += [tool for tool in offered if tool["function"]["name"] not in _names(tools)]
        rng.shuffle(tools)
        if rng.random() < 0.4:
            turns.insert(0, {"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)})
        yield Document(f"tool conversation {number}", messages=tuple(turns), tools=tuple(tools))


def _names(tools: list[Message]) -> set[str]:
    return {tool["function"]["name"] for tool in tools}


def _call(name: str, arguments: Values) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _calling(reasoning: str, *calls: Message, said: str = "") -> Message:
    return assistant(said, reasoning) | {"tool_calls": list(calls)}


def _returned(value: Any) -> Message:
    return {"role": "tool", "content": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def _spoken(values: Values) -> dict[str, str]:
    """Values as they are said, not as JSON writes them."""
    return {key: listed(value) if isinstance(value, list) else str(value) for key, value in values.items()}


def _request(rng: random.Random, tool: Tool) -> tuple[str, Values, Values]:
    """A question, all values for the sentences, and those of them that the question's call passes."""
    values = {name: make(rng) for name, (_, _, _, make) in tool.parameters.items()}
    asked = rng.choice(tool.asked)
    passed = {name: value for name, value in values.items() if tool.parameters[name][2] or f"{{{name}}}" in asked}
    return asked.format(**_spoken(values)), values, passed


def _answered(rng: random.Random, calls: int) -> tuple[list[Message], list[Message]]:
    """Questions that one round of calls answers; several calls are made at once."""
    chosen = rng.sample(TOOLS, rng.randint(1, calls))
    chosen += [rng.choice(chosen) for _ in range(calls - len(chosen))]
    names = {tool.words: written_name(rng, tool.words) for tool in chosen}
    asked, made, results, told = [], [], [], []
    for tool in chosen:
        question, values, passed = _request(rng, tool)
        result = tool.result(rng, values)
        asked.append(question)
        made.append(_call(names[tool.words], passed))
        results.append(_returned(result))
        told.append(rng.choice(tool.told).format(**_spoken({**values, **result})))
    how_many = "one call" if calls == 1 else f"{calls} calls, which do not depend on each other"
    reasoning = f"The user's request needs {how_many}. I use {listed(sorted(names.values()))}."
    turns = [user(" ".join(asked)), _calling(reasoning, *made), *results]
    turns.append(assistant("\n".join(told), "The results are there; I report them."))
    if rng.random() < 0.15:  # what a server is asked next: only the question and the call
        turns = turns[:2]
    return turns, [schema(rng, tool, names[tool.words]) for tool in {tool.words: tool for tool in chosen}.values()]


def _retried(rng: random.Random) -> tuple[list[Message], list[Message]]:
    """The tool fails once."""
    tool = rng.choice(TOOLS)
    name = written_name(rng, tool.words)
    question, values, passed = _request(rng, tool)
    result, failure = tool.result(rng, values), rng.choice(_FAILURES)
    turns = [
        user(question),
        _calling(f"I need {name} for this.", _call(name, passed)),
        _returned({"error": failure}),
    ]
    if rng.random() < 0.6:
        turns += [
            _calling(f"The call failed: {failure}. I try once more.", _call(name, passed), said="I try again."),
            _returned(result),
            assistant(rng.choice(tool.told).format(**_spoken({**values, **result})), "It worked this time."),
        ]
    else:
        turns.append(
            assistant(f"Sorry, that did not work: {failure}. Shall I try again?", "I must not invent a result.")
        )
    return turns, [schema(rng, tool, name)]


def _not_needed(rng: random.Random) -> tuple[list[Message], list[Message]]:
    """A tool is offered and is not the right one, or something is missing."""
    tool, other = rng.sample(TOOLS, 2)
    question, _, _ = _request(rng, tool)
    if rng.random() < 0.5:
        a, b = rng.randrange(10, 999), rng.randrange(10, 999)
        turns = [user(f"What is {a} + {b}?"), assistant(f"{a} + {b} = {a + b}.", "I need no tool for an addition.")]
    else:
        reply = f"I have no tool for that; I can only help with: {other.description.lower()}."
        turns = [user(question), assistant(reply, f"That would need a tool to {tool.words}, which I do not have.")]
    return turns, [schema(rng, other, written_name(rng, other.words))]


def _called_function(rng: random.Random, function: library.Function) -> tuple[list[Message], list[Message]]:
    """A call of a tool with a long description, arguments made to fit its parameters."""
    tool = function_schema(function)
    made: dict[str, Any] = {"boolean": True, "integer": rng.randrange(100), "array": ["a", "b"], "object": {}}
    properties: Values = tool["function"]["parameters"]["properties"]
    arguments = {
        name: made.get(property_["type"], f"{name}_{rng.randrange(10)}")
        for name, property_ in properties.items()
        if name in tool["function"]["parameters"]["required"] or rng.random() < 0.4
    }
    said = ", ".join(f"{name} = {json.dumps(value)}" for name, value in arguments.items()) or "the defaults"
    name = tool["function"]["name"]
    turns = [
        user(f"Please run {name} with {said}."),
        _calling(f"{function.summary} The arguments are given: {said}.", _call(name, arguments)),
        _returned({"status": "ok", "milliseconds": rng.randrange(1, 900)}),
        assistant(f"`{name}` finished without an error.", "It returned ok."),
    ]
    return turns, [tool]


_CODE_TOOLS = (
    ("list_directory", "List the entries of a folder", {"path": {"type": "string"}}),
    (
        "read_file",
        "Read lines of a text file",
        {"path": {"type": "string"}, "first_line": {"type": "integer"}, "last_line": {"type": "integer"}},
    ),
    ("search_text", "Search files for a text", {"pattern": {"type": "string"}, "path": {"type": "string"}}),
)


def _reading_code(rng: random.Random) -> tuple[list[Message], list[Message]]:
    """An agent that searches a real file of the library, reads a part of it, and reports."""
    path, text = library.library_file(rng)
    lines = text.splitlines()
    found = [(i, line) for i, line in enumerate(lines, start=1) if line.lstrip().startswith(("def ", "class "))]
    tools: list[Message] = [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": description,
                "parameters": {"type": "object", "properties": properties, "required": list(properties)[:1]},
            },
        }
        for name, description, properties in _CODE_TOOLS
    ]
    if not found:
        first = "\n".join(lines[:40])
        return [
            user(f"Show me the beginning of {path}."),
            _calling(f"I read {path}.", _call("read_file", {"path": path, "first_line": 1, "last_line": 40})),
            _returned(first),
            assistant(f"`{path}` has {len(lines)} lines and defines no function or class."),
        ], tools
    number, line = rng.choice(found)
    name = line.split("(")[0].split(":")[0].split()[-1]
    last = min(len(lines), number + rng.randrange(10, 45))
    hits = [f"{path}:{i}: {hit.strip()}" for i, hit in enumerate(lines, start=1) if name in hit][:12]
    return [
        user(
            rng.choice((f"Where is `{name}` defined and used in {path}?", f"Find {name} in {path} and show it to me."))
        ),
        _calling(f"I search for {name} first.", _call("search_text", {"pattern": name, "path": path})),
        _returned("\n".join(hits)),
        _calling(
            f"It is defined in line {number}. I read from there.",
            _call("read_file", {"path": path, "first_line": number, "last_line": last}),
        ),
        _returned("\n".join(f"{i:>5}  {lines[i - 1]}" for i in range(number, last + 1))),
        assistant(
            f"`{name}` is defined in line {number} of `{path}`; the search shows {len(hits)} lines that name it.",
            f"The definition starts with: {line.strip()}",
        ),
    ], tools
