"""What a source yields: one text, or one conversation with what its template needs. And conversations of all dialects.

Datasets spell conversations in several ways (OpenAI's, ShareGPT's, JSON within JSON); templates want one of them:
messages with ``role``, ``content``, and ``tool_calls`` whose arguments are objects; tools as JSON schemas.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

Message = dict[str, Any]

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Document:
    """Either ``text``, or ``messages``; ``images`` are those of the messages' ``{"type": "image"}`` parts, in order.

    ``name`` says where it is from, for messages about it. ``variables`` go to the chat template (reasoning_effort).
    """

    name: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[Message, ...] = ()
    images: tuple[Image, ...] = ()
    variables: dict[str, Any] = field(default_factory=dict)


def conversation(name: str, messages: Any, tools: Any = None) -> Document:
    """A document of messages and tools in any common dialect.

    Raises:
        ValueError: it is none; says what was found.
    """
    found = _parsed(messages)
    if isinstance(found, dict):
        found = found.get("messages", found.get("conversations"))
    if not isinstance(found, list) or not found:
        raise ValueError("a list of messages is needed")
    return Document(name, messages=tuple(map(_message, found)), tools=tuple(map(_tool, _parsed(tools) or ())))


def question(name: str, asked: str, answer: str = "", calls: Any = None, tools: Any = None) -> Document:
    """A document of one question, and its answer or the tool calls that answer it (a list of name and arguments)."""
    reply: Message = {"role": "assistant", "content": answer}
    if calls is not None:
        found = _parsed(calls)
        if not isinstance(found, list):
            raise ValueError("a list of tool calls is needed")
        reply["tool_calls"] = found
    return conversation(name, [{"role": "user", "content": asked}, reply], tools)


def _parsed(value: Any) -> Any:
    """JSON within JSON is common: lists and objects that datasets store as text."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError(f"neither messages nor JSON: {value[:40]!r}") from None
    return value


def _message(entry: Any) -> Message:
    if not isinstance(entry, dict):
        raise ValueError(f"a message must be an object, found {entry!r:.60}")
    role = _ROLES.get(str(entry.get("role", entry.get("from"))).lower())
    if role is None:
        raise ValueError(f"a message's role is {entry.get('role', entry.get('from'))!r}")
    content = entry.get("content", entry.get("value"))
    if content is not None and not isinstance(content, str | list):
        raise ValueError(f"a message's content must be text or a list of parts, found {content!r:.60}")
    message: Message = {"role": role, "content": content or ""}
    if isinstance(content, list):
        message["content"] = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if role != "assistant":
        return message
    reasoning = entry.get("reasoning_content", entry.get("reasoning"))
    if not reasoning and (thought := _THOUGHT.match(message["content"])):
        reasoning, message["content"] = thought[1].strip(), message["content"][thought.end() :]
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls := entry.get("tool_calls"):
        message["tool_calls"] = [_call(call) for call in _parsed(calls)]
    return message


def _call(entry: Any) -> Message:
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool call must have a name and arguments, found {entry!r:.60}")
    arguments = _parsed(function.get("arguments") or {})
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments of the tool call {function['name']} must be an object, found {arguments!r:.60}")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tool(entry: Any) -> Message:
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool must have a name and parameters, found {entry!r:.60}")
    parameters = function.get("parameters") or {}
    if parameters and "properties" not in parameters and "type" not in parameters:
        parameters = {"type": "object", "properties": parameters}  # parameters alone, as xlam lists them
    return {"type": "function", "function": {**function, "parameters": parameters}}
