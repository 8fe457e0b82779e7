"""Prompts of a wanted length, each with a beginning of its own, so that no prefix cache shortens the work."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from step128_evals.acceptance.material import python_code
from step128_evals.chat import SEED
from step128_evals.client import Client
from step128_evals.errors import BadInputError
from step128_evals.files import sha256
from step128_evals.probe import Endpoint
from step128_evals.tokens import find_counter, tokenize_with

_CHARACTERS_PER_TOKEN = 6
_SAMPLE_CHARACTERS = 20_000


@dataclass
class PromptMaker:
    """Makes prompts from Python's standard library: in token ids, exact, or as text of about the wanted length.

    ``nonce`` is new in each process: the same header again, in a resumed or a second run, would be in the server's
    prefix cache already.
    """

    client: Client
    endpoint: Endpoint
    nonce: str = field(default_factory=lambda: secrets.token_hex(4))
    _tokens: list[int] = field(default_factory=list)
    _tokens_per_character: float | None = None

    @property
    def exact(self) -> bool:
        """Whether prompts are token ids for ``/v1/completions``; else they are texts for the chat."""
        return self.endpoint.can("completions") and self.endpoint.can("tokenize")

    async def make(self, length: int, name: str, tail: str | None = None) -> list[int] | str:
        """A prompt.

        Args:
            length: in tokens; a shorter one than its header becomes the header alone.
            name: decides the header, which comes first.
            tail: decides a second header, which comes last: prompts with equal names and lengths differ only there.
        """
        headers = [self._header(name), "" if tail is None else self._header(tail)]
        if not self.exact:
            return await self._text(length, headers)
        first, last = [await self._tokenize(header) if header else [] for header in headers]
        body = await self._body(length - len(first) - len(last))
        return first + body + last

    def _header(self, name: str) -> str:
        return f"# {sha256(f'{SEED} {self.nonce} {name}')[:32]}\n"

    async def _tokenize(self, text: str) -> list[int]:
        return await tokenize_with(self.client, self.endpoint.how("tokenize"), self.endpoint.model, text)

    async def _body(self, length: int) -> list[int]:
        """So many tokens of code; tokenized once for the longest prompt."""
        source = python_code()
        characters = max(length, 0) * _CHARACTERS_PER_TOKEN
        while len(self._tokens) < length:
            if len(self._tokens) and characters > 2 * len(source):
                raise BadInputError(f"the standard library gives {len(self._tokens)} tokens, and {length} are wanted")
            self._tokens = await self._tokenize(source[:characters])
            characters *= 2
        return self._tokens[: max(length, 0)]

    async def _text(self, length: int, headers: list[str]) -> str:
        source = python_code()
        if self._tokens_per_character is None:
            # A server need not take a long sample: 20,000 characters are about 6,000 tokens.
            limit = min(_SAMPLE_CHARACTERS, (self.endpoint.max_context_tokens or _SAMPLE_CHARACTERS) // 2)
            counter = await find_counter(self.client, self.endpoint.model, None, source[:limit])
            self._tokens_per_character = counter.tokens_per_character
        characters = round(length / self._tokens_per_character) - sum(map(len, headers))
        return headers[0] + source[: max(characters, 0)] + headers[1]
