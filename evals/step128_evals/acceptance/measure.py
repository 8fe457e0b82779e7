"""One prompt between two readings of the counters."""

from __future__ import annotations

from step128_evals.acceptance.material import Prompt
from step128_evals.chat import Answer, ChatRequest, ask_chat
from step128_evals.client import Client
from step128_evals.completion import IGNORE_EOS, complete
from step128_evals.errors import EvalError, UnsupportedError
from step128_evals.metrics import drafts_between, foreign_traffic, read_at_rest, read_metrics
from step128_evals.probe import Endpoint
from step128_evals.runs import Item

_UNKNOWN_FIELD = (400, 422)
"""How a server refuses a body with a field that it does not know."""


async def measure_prompt(client: Client, endpoint: Endpoint, prompt: Prompt, max_tokens: int) -> Item:
    """Ask a prompt greedily; its drafts are what the counters gained meanwhile.

    Counters do not tell requests apart, so nothing else may use the server: if something did, the prompt counts as an
    error, and the same command asks it again.

    Raises:
        UnsupportedError: a question, and the endpoint has no chat.
        EvalError: no answer, or the server worked for others too.
    """
    before = await read_metrics(client)
    if prompt.question:
        if not endpoint.can("streaming"):
            raise UnsupportedError(f"the endpoint has no streamed chat: {endpoint.how('streaming')}")
        request = ChatRequest([{"role": "user", "content": prompt.question}], max_tokens=max_tokens)
        answer = await ask_chat(client, endpoint.model, request)
    else:
        answer = await _continue(client, endpoint, prompt, max_tokens)
    after = await read_at_rest(client)
    if before is None or after is None:
        raise EvalError(f"{client.root_url} hides its /metrics since the run began")
    tokens = answer.tokens if answer.tokens_counted else None
    if others := foreign_traffic(before, after, requests=1, tokens=tokens):
        raise EvalError(f"not alone on the server: {others}. Its counters do not tell requests apart.")
    drafts = drafts_between(before.drafts, after.drafts)
    data = {
        "domain": prompt.domain,
        "question": prompt.question,
        "prompt_tokens": answer.prompt_tokens or len(prompt.tokens),
        "text": answer.reasoning + answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": answer.tokens,
        "first_token_seconds": answer.first_token_seconds,
        "seconds": answer.total_seconds,
        "counts_drafts": drafts is not None,
        "drafts": int(drafts.drafts) if drafts else 0,
        "accepted": [int(count) for count in drafts.accepted] if drafts else [],
    }
    return Item(prompt.id, "measured", data=data)


async def _continue(client: Client, endpoint: Endpoint, prompt: Prompt, max_tokens: int) -> Answer:
    """All of ``max_tokens``, or up to the end where the server refuses to go on after it."""
    try:
        return await complete(client, endpoint.model, list(prompt.tokens), max_tokens, IGNORE_EOS)
    except EvalError as error:
        if error.status not in _UNKNOWN_FIELD:
            raise
    return await complete(client, endpoint.model, list(prompt.tokens), max_tokens)
