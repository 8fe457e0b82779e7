"""From documents and options to the windows of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from step128_evals.errors import BadInputError, UnsupportedError
from step128_evals.perplexity.documents import SEPARATORS, Documents
from step128_evals.perplexity.scoring import Scorer
from step128_evals.perplexity.windows import (
    LLAMA_CPP,
    LM_EVAL,
    STEP128,
    Window,
    find_bos,
    llama_cpp_windows,
    lm_eval_windows,
    step128_windows,
    text_pieces,
)

_SAMPLE_CHARACTERS = 4000


@dataclass(frozen=True)
class PlanOptions:
    """``context_tokens``: of one request, BOS included. ``prefix_token``: an id or a token's text, for lm-eval."""

    definition: str = STEP128
    context_tokens: int = 2048
    stride_tokens: int | None = None
    max_chunks: int | None = None
    separator: str = "blank-line"
    prefix_token: str | None = None


@dataclass(frozen=True)
class Plan:
    """``settings`` decide the windows; ``sizes`` are (words, bytes, windows) of each document, for lm-eval."""

    windows: tuple[Window, ...]
    settings: dict[str, Any]
    sizes: tuple[tuple[int, int, int], ...] = ()

    @property
    def ids(self) -> list[str]:
        """Item ids, in the windows' order."""
        return [f"{number:05d}" for number in range(len(self.windows))]


async def make_plan(documents: Documents, scorer: Scorer, options: PlanOptions) -> Plan:
    """Tokenize and cut.

    Raises:
        BadInputError: options or text do not fit the definition or the model.
        UnsupportedError: the definition needs a tokenizer, and the endpoint has none.
    """
    _check(options, scorer)
    common = {
        "definition": options.definition,
        "text": documents.label,
        "text_sha256": documents.sha256,
        "documents": len(documents.texts),
        "separator": options.separator,
        "context_tokens": options.context_tokens,
    }
    if options.definition == LM_EVAL:
        return await _lm_eval_plan(documents, scorer, options, common)
    text = documents.joined(SEPARATORS[options.separator])
    if not scorer.has_tokenizer:
        return await _pieces_plan(text, scorer, options, common)
    bos = await find_bos(scorer.tokenize)
    tokens = await scorer.tokenize(text, False)
    if options.definition == LLAMA_CPP:
        windows = llama_cpp_windows(tokens, bos, options.context_tokens, options.max_chunks)
        stride = options.context_tokens
    else:
        windows = step128_windows(tokens, bos, options.context_tokens, options.max_chunks, options.stride_tokens)
        stride = options.stride_tokens or options.context_tokens - len(bos)
    found = {"stride_tokens": stride, "bos_token_ids": list(bos), "text_tokens": len(tokens)}
    return Plan(tuple(windows), common | found)


def _check(options: PlanOptions, scorer: Scorer) -> None:
    limit = scorer.limit_tokens
    if limit is not None and options.context_tokens > limit:
        raise BadInputError(
            f"{options.context_tokens} context tokens do not fit: at most {limit} do (a server needs one token of its "
            f"context for the answer). Use --context-tokens {limit} or less."
        )
    if options.stride_tokens is not None and options.definition != STEP128:
        raise BadInputError(f"--stride is of the definition {STEP128}; {options.definition}'s windows are fixed")
    if options.definition == LM_EVAL and options.max_chunks is not None:
        raise BadInputError("--max-chunks would cut a document in two, and lm-eval's figures are of whole documents")
    if options.prefix_token is not None and options.definition != LM_EVAL:
        raise BadInputError("--prefix-token is of the definition lm-eval")
    if not scorer.has_tokenizer and (options.definition != STEP128 or options.stride_tokens is not None):
        raise UnsupportedError(
            f"unsupported: {scorer.endpoint.base_url} has no tokenizer, which a stride and the definitions "
            f"{LLAMA_CPP} and {LM_EVAL} need: {scorer.endpoint.how('tokenize')}"
        )


async def _lm_eval_plan(documents: Documents, scorer: Scorer, options: PlanOptions, common: dict[str, Any]) -> Plan:
    prefix = await _prefix(scorer, options)
    windows: list[Window] = []
    sizes, count = [], 0
    for number, text in enumerate(text for text in documents.texts if text.strip()):
        tokens = await scorer.tokenize(text, False)
        cut = lm_eval_windows(tokens, prefix, options.context_tokens, number)
        # Words as the harness counts them: pieces between white space, an empty one at either end included.
        sizes.append((len(re.split(r"\s+", text)), len(text.encode("utf-8", "surrogatepass")), len(cut)))
        windows += cut
        count += len(tokens)
    if not windows:
        raise BadInputError("the text has no tokens")
    found = {
        "stride_tokens": options.context_tokens - 1,
        "bos_token_ids": [],
        "prefix_token_id": prefix,
        "text_tokens": count,
    }
    return Plan(tuple(windows), common | found, tuple(sizes))


async def _prefix(scorer: Scorer, options: PlanOptions) -> int:
    if options.prefix_token is not None:
        if options.prefix_token.isdecimal():
            return int(options.prefix_token)
        ids = await scorer.tokenize(options.prefix_token, False)
        if len(ids) != 1:
            raise BadInputError(f"--prefix-token {options.prefix_token!r} is {len(ids)} tokens, not one: {ids}")
        return ids[0]
    prefix = await scorer.usual_prefix()
    if prefix is None:
        bos = await find_bos(scorer.tokenize)
        prefix = bos[0] if bos else None
    if prefix is None:
        raise BadInputError(
            "lm-eval begins each document with the tokenizer's BOS token, or its EOS token where it has none; the "
            "endpoint's tokenizer puts none before a text, so it must be named: --prefix-token '<|endoftext|>', say"
        )
    return prefix


async def _pieces_plan(text: str, scorer: Scorer, options: PlanOptions, common: dict[str, Any]) -> Plan:
    """Pieces of text of about so many tokens, by the tokens that a sample turns out to have."""
    sample = text[:_SAMPLE_CHARACTERS]
    scored = await scorer.score(Window(sample, 1), 0)
    # A tenth less: pieces vary, and one that is too long would be refused.
    characters = int(len(sample) / (len(scored.tokens) + 1) * (options.context_tokens - 1) * 0.9)
    windows = text_pieces(text, max(2, characters), options.max_chunks)
    found: dict[str, Any] = {
        "stride_tokens": None,
        "bos_token_ids": [],
        "text_tokens": None,
        "piece_characters": characters,
    }
    return Plan(tuple(windows), common | found)
