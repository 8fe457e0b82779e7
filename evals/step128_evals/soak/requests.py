"""One request of each kind, and the canary."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from step128_evals.acceptance.questions import CHAT, word_problems
from step128_evals.chat import SEED, Answer, ChatRequest, ask_chat
from step128_evals.client import Client
from step128_evals.completion import complete
from step128_evals.depth.prompts import PromptMaker
from step128_evals.errors import EvalError
from step128_evals.probe import Endpoint
from step128_evals.smoke import draw_picture
from step128_evals.soak.plan import Request

CANARY = "Write the numbers from one to twenty as words, with a comma after each."
_QUESTIONS = (*CHAT, *word_problems(40, SEED))
_SHORTEST_ANSWER_TOKENS = 16
_SHORTEST_LONG_SHARE = 0.25
_MOST_PIECES_BEFORE_CANCELLING = 20
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Get the time of day in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True)
class Asker:
    """Asks requests of a :class:`Plan`; ``max_tokens`` and ``long_tokens`` bound answers and long prompts."""

    client: Client
    endpoint: Endpoint
    prompts: PromptMaker
    max_tokens: int
    long_tokens: int

    async def ask(self, request: Request) -> dict[str, Any]:
        """Ask, and return what an item keeps; raises EvalError if it fails."""
        if request.kind == "long":
            return _kept(await self._long(request))
        chat = self._chat(request)
        if request.kind == "cancelled":
            return await self._cancelled(chat, 1 + int(request.size * _MOST_PIECES_BEFORE_CANCELLING))
        return _kept(await ask_chat(self.client, self.endpoint.model, chat))

    async def canary(self) -> dict[str, Any]:
        """The same greedy question each time; the answer's text is kept."""
        messages = [{"role": "user", "content": CANARY}]
        request = ChatRequest(messages, max_tokens=self.max_tokens, stream=self.endpoint.can("streaming"))
        answer = await ask_chat(self.client, self.endpoint.model, request)
        return _kept(answer) | {"text": answer.reasoning + answer.text}

    def _chat(self, request: Request) -> ChatRequest:
        content: Any = _QUESTIONS[request.number % len(_QUESTIONS)]
        if request.kind == "image":
            url = f"data:image/png;base64,{base64.b64encode(draw_picture()).decode()}"
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is in it?"}]
        answer = _SHORTEST_ANSWER_TOKENS + int(request.size * max(self.max_tokens - _SHORTEST_ANSWER_TOKENS, 0))
        return ChatRequest(
            [{"role": "user", "content": content}],
            max_tokens=min(answer, self.max_tokens),
            tools=[_TOOL] if request.kind == "tools" else None,
            stream=self.endpoint.can("streaming") and request.kind != "whole",
        )

    async def _long(self, request: Request) -> Answer:
        share = _SHORTEST_LONG_SHARE + (1 - _SHORTEST_LONG_SHARE) * request.size
        prompt = await self.prompts.make(int(self.long_tokens * share), request.id)
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
            stream = self.endpoint.can("streaming")
            chat = ChatRequest(messages, max_tokens=_SHORTEST_ANSWER_TOKENS, stream=stream)
            return await ask_chat(self.client, self.endpoint.model, chat)
        return await complete(self.client, self.endpoint.model, prompt, _SHORTEST_ANSWER_TOKENS)

    async def _cancelled(self, chat: ChatRequest, pieces: int) -> dict[str, Any]:
        """Break off a stream after so many pieces, as a user who closes the window does."""
        taken, finish_reason = 0, None
        with self.client.explained():
            create: Any = self.client.openai.chat.completions.create
            async with await create(**chat.body(self.endpoint.model)) as stream:
                async for chunk in stream:
                    taken += len(chunk.choices[:1])
                    finish_reason = next((choice.finish_reason for choice in chunk.choices), None)
                    if finish_reason or taken >= pieces:
                        break
        if not finish_reason and taken < pieces:
            raise EvalError(f"the stream ended without a finish reason after {taken} pieces")
        return {"cancelled": not finish_reason, "pieces": taken}


def _kept(answer: Answer) -> dict[str, Any]:
    return {
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "first_token_seconds": answer.first_token_seconds,
        "seconds": answer.total_seconds,
        "finish_reason": answer.finish_reason,
    }
