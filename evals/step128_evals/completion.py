"""One streamed completion of a prompt in token ids, which no chat template changes, with its times."""

from __future__ import annotations

import time
from typing import Any

from step128_evals.chat import SEED, Answer
from step128_evals.client import Client
from step128_evals.errors import EvalError

# Generate as many tokens as asked, whatever they are: an extension of vLLM that llama.cpp and SGLang have too.
IGNORE_EOS = {"ignore_eos": True}


async def complete(
    client: Client, model: str, prompt: list[int] | str, max_tokens: int, extra: dict[str, Any] | None = None
) -> Answer:
    """Continue a prompt greedily, with a fixed seed.

    Args:
        client: open.
        model: name of the served model.
        prompt: token ids, or a text that the server tokenizes.
        max_tokens: to generate.
        extra: goes into the body as it is.

    Returns:
        Tokens as the server counts them: with speculative decoding a chunk of the stream holds several. The last token
        is timed by the chunk with the finish reason.

    Raises:
        EvalError: the request was refused, the stream broke off, or the answer does not follow the API.
    """
    started = time.perf_counter()
    first = last = started
    text = finish_reason = ""
    usage: Any = None
    chunks = 0
    with client.explained():
        create: Any = client.openai.completions.create  # its types know only OpenAI's own models and options
        stream = await create(
            model=model,
            prompt="",
            max_tokens=max_tokens,
            temperature=0.0,
            seed=SEED,
            stream=True,
            stream_options={"include_usage": True},
            # The client converts its own arguments piece by piece: seconds for 200,000 token ids, before it sends them.
            extra_body={"prompt": prompt, **(extra or {})},
        )
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices[:1]:
                last = time.perf_counter()
                first = first if chunks else last
                chunks += 1
                text += choice.text or ""
                finish_reason = choice.finish_reason or finish_reason
    if not finish_reason:
        raise EvalError(f"the stream ended without a finish reason after {len(text)} characters")
    return Answer(
        text=text,
        reasoning="",
        tool_calls=(),
        finish_reason=finish_reason,
        tokens=usage.completion_tokens if usage else chunks,
        first_token_seconds=first - started,
        total_seconds=last - started,
        prompt_tokens=usage.prompt_tokens if usage else None,
        tokens_counted=usage is not None,
    )
