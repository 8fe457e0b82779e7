"""Whether the model gets to see the tools at all: a server may take them and leave them out of the prompt."""

from __future__ import annotations

from typing import Any

from step128_evals.chat import ChatRequest, ask_chat
from step128_evals.client import Client
from step128_evals.errors import UnsupportedError


async def require_tools_in_prompt(client: Client, model: str, tools: list[dict[str, Any]]) -> None:
    """Ask with and without tools, and compare what the server counts as the prompt.

    llama.cpp's server does so with a chat template that knows no tools (seen with SmolLM2's, build of 2026-11): every
    call would be missing, which says nothing about the model.

    Raises:
        UnsupportedError: the prompt is as long without the tools. A server that counts no prompt tokens is believed.
    """
    messages = [{"role": "user", "content": "Hello"}]
    with_tools, without = [
        await ask_chat(client, model, ChatRequest(messages, max_tokens=1, tools=offered, stream=False))
        for offered in (tools, None)
    ]
    if with_tools.prompt_tokens is not None and with_tools.prompt_tokens == without.prompt_tokens:
        raise UnsupportedError(
            f"unsupported: {client.root_url} takes tools and leaves them out of the prompt, which has "
            f"{without.prompt_tokens} tokens with and without them: its chat template has no tools"
        )
