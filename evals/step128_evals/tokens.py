"""Token counts by the server's own tokenizer, in the dialects that servers have, or estimated where there is none."""

from __future__ import annotations

from dataclasses import dataclass

from step128_evals.client import Client

VLLM, LLAMA_CPP = "vllm", "llama.cpp"


async def tokenize_with(
    client: Client, dialect: str, model: str, text: str, add_special_tokens: bool = False
) -> list[int]:
    """Token ids of a text, by ``/tokenize``.

    Args:
        client: open.
        dialect: :data:`VLLM` or :data:`LLAMA_CPP`.
        model: name of the served model.
        text: the text.
        add_special_tokens: with what the tokenizer puts before and after a text (BOS, say).
    """
    if dialect == VLLM:
        return await client.tokenize(model, text, add_special_tokens)
    body = {"content": text, "add_special": add_special_tokens, "parse_special": False}
    with client.explained():
        return [int(token) for token in (await client.post("/tokenize", body))["tokens"]]


@dataclass(frozen=True)
class TokenCounter:
    """Counts tokens; ``dialect`` None: by ``tokens_per_character``, measured once, and ``exact`` is false."""

    client: Client
    model: str
    dialect: str | None
    tokens_per_character: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether counts are the server's own."""
        return self.dialect is not None

    async def count(self, text: str) -> int:
        """Tokens of a text, special tokens not counted."""
        if self.dialect is None:
            return round(len(text) * self.tokens_per_character)
        return len(await tokenize_with(self.client, self.dialect, self.model, text))

    async def longest_prefix(self, text: str, limit_tokens: int) -> str:
        """The longest beginning of a text, in whole lines, of at most ``limit_tokens`` tokens."""
        lines = text.splitlines(keepends=True)
        low, high = 0, len(lines)
        while low < high:
            middle = (low + high + 1) // 2
            if await self.count("".join(lines[:middle])) <= limit_tokens:
                low = middle
            else:
                high = middle - 1
        return "".join(lines[:low])


async def find_counter(client: Client, model: str, dialect: str | None, sample: str) -> TokenCounter:
    """A counter in the dialect that a probe found, or one calibrated on a sample's prompt tokens.

    Raises:
        EvalError: the server has no tokenizer and reports no prompt tokens either.
    """
    if dialect is not None:
        return TokenCounter(client, model, dialect)

    async def prompt_tokens(content: str) -> int:
        body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
        with client.explained():
            return int((await client.post("/v1/chat/completions", body))["usage"]["prompt_tokens"])

    # The difference of two prompts leaves the chat template out.
    used = await prompt_tokens(sample) - await prompt_tokens(sample[:1])
    return TokenCounter(client, model, None, max(used, 1) / max(1, len(sample) - 1))
