"""The prompts of each domain, all from what is on every machine, so that two people ask the same."""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import cache

from step128_evals.acceptance.questions import CHAT, word_problems
from step128_evals.corpus import prose, python_corpus
from step128_evals.errors import BadInputError
from step128_evals.files import sha256

DOMAINS = ("code", "chat", "prose", "maths", "long")
_CHARACTERS_PER_TOKEN = 8  # more than any tokenizer makes of English or code

Tokenize = Callable[[str], Awaitable[list[int]]]


@dataclass(frozen=True)
class Prompt:
    """``tokens`` of a text to continue, or else a ``question`` for the chat."""

    id: str
    domain: str
    tokens: tuple[int, ...] = ()
    question: str = ""


@dataclass(frozen=True)
class Sizes:
    """How much to ask: prompts of each domain (``long``: ``long_prompts``), and tokens of each prompt."""

    prompts: int
    prompt_tokens: int
    long_prompts: int
    long_tokens: int
    seed: int


def cut_prompts(tokens: list[int], prompts: int, prompt_tokens: int) -> list[list[int]]:
    """Take ``prompts`` pieces of ``prompt_tokens`` tokens, evenly spread over the text, not overlapping.

    Raises:
        BadInputError: the text is too short.
    """
    if len(tokens) < prompts * prompt_tokens:
        raise BadInputError(
            f"the text has {len(tokens)} tokens; {prompts} prompts of {prompt_tokens} need {prompts * prompt_tokens}"
        )
    stride = len(tokens) // prompts
    return [tokens[i * stride : i * stride + prompt_tokens] for i in range(prompts)]


async def text_prompts(text: str, sizes: Sizes, tokenize: Tokenize) -> list[Prompt]:
    """Prompts of the domain ``text``: pieces of a text of the user's."""
    pieces = cut_prompts(await tokenize(text), sizes.prompts, sizes.prompt_tokens)
    return [Prompt(f"text-{index:02}", "text", tuple(piece)) for index, piece in enumerate(pieces)]


async def domain_prompts(domain: str, sizes: Sizes, tokenize: Tokenize) -> list[Prompt]:
    """The prompts of a domain of :data:`DOMAINS`; ``chat`` has at most as many as there are questions."""
    if domain in ("chat", "maths"):
        questions = CHAT[: sizes.prompts] if domain == "chat" else word_problems(sizes.prompts, sizes.seed)
        return [Prompt(f"{domain}-{i:02}", domain, question=question) for i, question in enumerate(questions)]
    code = python_code() if domain in ("code", "long") else ""
    english = prose() if domain in ("prose", "long") else ""
    count, length = sizes.prompts, sizes.prompt_tokens
    if domain == "long":
        count, length = sizes.long_prompts, sizes.long_tokens
    draw = random.Random(f"{sizes.seed} {domain}")
    prompts = []
    for index in range(count):
        text = (code, english)[index % 2] if domain == "long" else code or english
        piece = await _piece(text, length, draw, tokenize)
        prompts.append(Prompt(f"{domain}-{index:02}", domain, tuple(piece)))
    return prompts


def with_bos(prompts: list[Prompt], bos: tuple[int, ...]) -> list[Prompt]:
    """Begin each text to continue as the server begins its own prompts; as long as it was."""
    return [
        replace(prompt, tokens=(*bos, *prompt.tokens)[: len(prompt.tokens)]) if prompt.tokens else prompt
        for prompt in prompts
    ]


@cache
def python_code() -> str:
    """All of the standard library, 11 MB."""
    return "\n".join(file.text for file in python_corpus().files)


async def _piece(text: str, length: int, draw: random.Random, tokenize: Tokenize) -> list[int]:
    """So many tokens from a line's beginning, somewhere in the text."""
    characters = min(length * _CHARACTERS_PER_TOKEN, len(text))
    start = draw.randint(0, len(text) - characters)
    start = text.rfind("\n", 0, start) + 1
    tokens = await tokenize(text[start : start + characters])
    if len(tokens) < length:
        raise BadInputError(f"the built-in text gives {len(tokens)} tokens, and {length} are wanted: ask for fewer")
    return tokens[:length]


def fingerprint(prompts: list[Prompt]) -> dict[str, str]:
    """Domain -> SHA-256 of its prompts: what tells two runs with equal settings that they asked the same."""
    by_domain: dict[str, list[object]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain, []).append([prompt.id, prompt.tokens, prompt.question])
    return {domain: sha256(json.dumps(content)) for domain, content in by_domain.items()}
