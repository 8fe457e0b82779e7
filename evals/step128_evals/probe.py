"""What an endpoint can do, found by asking it: each capability costs one tiny request."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Awaitable, Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from step128_evals.chat import ChatRequest, ask_chat
from step128_evals.client import Client
from step128_evals.errors import BusyError, EvalError, ServerUnreachableError, UnauthorizedError, UnsupportedError
from step128_evals.metrics import parse_counters
from step128_evals.tokens import LLAMA_CPP, VLLM, tokenize_with

CAPABILITIES = (
    "chat",
    "streaming",
    "completions",
    "tokenize",
    "prompt_logprobs",
    "tools",
    "images",
    "reasoning_effort",
    "metrics",
    "speculative_decoding",
)


NO_ANSWER = (ServerUnreachableError, UnauthorizedError, BusyError)
"""Errors that say nothing of what a server can do."""


@dataclass(frozen=True)
class Capability:
    """``how``: the dialect, if there is more than one; or why not, in the endpoint's words."""

    supported: bool
    how: str = ""


@dataclass(frozen=True)
class Endpoint:
    """``max_context_tokens`` is None if the server does not say, and so is ``root``, what the model was loaded from. A
    supported tool call means that requests with tools are taken, not that the model calls any; the same for images and
    ``reasoning_effort``."""

    base_url: str
    server: str
    model: str
    max_context_tokens: int | None
    capabilities: dict[str, Capability]
    root: str | None = None

    def can(self, name: str) -> bool:
        """Whether the endpoint has a capability of :data:`CAPABILITIES`."""
        return self.capabilities[name].supported

    def how(self, name: str) -> str:
        """The dialect of a supported capability."""
        return self.capabilities[name].how

    def require(self, *names: str) -> None:
        """Raise UnsupportedError, with the endpoint's own reason, unless it has all of these."""
        for name in names:
            if not self.can(name):
                raise UnsupportedError(
                    f"unsupported: {self.base_url} ({self.server}) has no {name.replace('_', ' ')}: {self.how(name)}"
                )

    def as_dict(self) -> dict[str, Any]:
        """For a manifest, a report, ``--json``."""
        return asdict(self)


async def probe_endpoint(client: Client, model_name: str | None, only: Collection[str] = CAPABILITIES) -> Endpoint:
    """Find out what a server can do.

    Args:
        client: open.
        model_name: as in ``/v1/models``; None for the first.
        only: the capabilities that an eval wants to know of; the others count as absent.

    Raises:
        ServerUnreachableError, UnauthorizedError, BusyError: nothing can be found out.
        EvalError: the server does not serve the model.
    """
    info = await client.model(model_name)
    probes: dict[str, Callable[[], Awaitable[str]]] = {
        "chat": lambda: _chat(client, info.name, stream=False),
        "streaming": lambda: _chat(client, info.name, stream=True),
        "completions": lambda: _completion(client, info.name),
        "tokenize": lambda: _tokenize(client, info.name),
        "prompt_logprobs": lambda: _prompt_logprobs(client, info.name),
        "tools": lambda: _chat(client, info.name, tools=[_TOOL]),
        "images": lambda: _chat(client, info.name, content=_picture()),
        "reasoning_effort": lambda: _reasoning_effort(client, info.name),
        "metrics": lambda: _metrics(client),
        "speculative_decoding": lambda: _speculative(client),
    }
    not_asked = Capability(False, "not asked")
    found = {name: await _capability(probes[name]) if name in only else not_asked for name in CAPABILITIES}
    server, context = await _identity(client)
    return Endpoint(client.root_url, server, info.name, info.max_context_tokens or context, found, info.root)


async def _capability(probe: Callable[[], Awaitable[str]]) -> Capability:
    try:
        return Capability(True, await probe())
    except NO_ANSWER:
        raise
    except EvalError as error:
        return Capability(False, str(error))


_TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Get the time of day in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


async def _chat(client: Client, model: str, content: Any = "Hello", **options: Any) -> str:
    messages = [{"role": "user", "content": content}]
    await ask_chat(client, model, ChatRequest(messages, max_tokens=4, **options))
    return ""


def _picture() -> list[dict[str, Any]]:
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(stream, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]


async def _reasoning_effort(client: Client, model: str) -> str:
    await _chat(client, model, reasoning_effort="low")
    return "taken; whether it changes anything is what `step128-eval reasoning` measures"


async def _completion(client: Client, model: str) -> str:
    await client.post("/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 1, "temperature": 0.0})
    return ""


async def _tokenize(client: Client, model: str) -> str:
    for dialect in (VLLM, LLAMA_CPP):
        try:
            if await tokenize_with(client, dialect, model, "Hello world"):
                return dialect
        except NO_ANSWER:
            raise
        except EvalError as error:
            reason = str(error)
    raise UnsupportedError(reason)


async def _prompt_logprobs(client: Client, model: str) -> str:
    """vLLM's own field, or the ``echo`` of OpenAI's first completions API, which lm-eval uses too."""
    body: dict[str, Any] = {"model": model, "prompt": "Hello world, hello", "max_tokens": 1, "temperature": 0.0}
    reasons = []
    for dialect, extra in (("prompt_logprobs", {"prompt_logprobs": 1}), ("echo", {"echo": True, "logprobs": 1})):
        try:
            choice = (await client.post("/v1/completions", body | extra))["choices"][0]
        except NO_ANSWER:
            raise
        except EvalError as error:
            reasons.append(str(error))
            continue
        if choice.get("prompt_logprobs"):
            return dialect
        values = (choice.get("logprobs") or {}).get("token_logprobs") or []
        if dialect == "echo" and len(values) > 2 and values[0] is None:
            return dialect
        reasons.append(f"{dialect} was ignored")
    raise UnsupportedError("; ".join(dict.fromkeys(reasons)))


async def _metrics(client: Client) -> str:
    try:
        parse_counters(await client.get_text("/metrics"))
    except UnauthorizedError as error:
        raise UnsupportedError(str(error)) from error
    except ValueError as error:
        raise UnsupportedError(f"/metrics is no Prometheus document: {error}") from error
    return ""


async def _speculative(client: Client) -> str:
    await _metrics(client)
    counters = parse_counters(await client.get_text("/metrics"))
    if counters is None:
        raise UnsupportedError("/metrics counts no drafts: it runs without MTP, or is not vLLM")
    return f"{len(counters.accepted)} draft tokens"


async def _identity(client: Client) -> tuple[str, int | None]:
    """(name of the server, context length) from routes that only some have; nothing here is an error."""
    for path in ("/props", "/version"):
        try:
            document = json.loads(await client.get_text(path))
        except (EvalError, ValueError):
            continue
        if path == "/version" and isinstance(document, dict) and "version" in document:
            return f"version {document['version']}", None
        if isinstance(document, dict) and "default_generation_settings" in document:
            context = document["default_generation_settings"].get("n_ctx")
            return f"llama.cpp {document.get('build_info', '')}".strip(), context if isinstance(context, int) else None
    try:
        return ("vLLM" if "vllm:" in await client.get_text("/metrics") else "unknown server"), None
    except EvalError:
        return "unknown server", None
