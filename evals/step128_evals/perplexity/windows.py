"""Which tokens are scored given which: three definitions of perplexity, each a way to cut token ids into windows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from step128_evals.errors import BadInputError, EvalError

STEP128, LLAMA_CPP, LM_EVAL = "step128", "llama.cpp", "lm-eval"
DEFINITIONS = (STEP128, LLAMA_CPP, LM_EVAL)

Tokenize = Callable[[str, bool], Awaitable[list[int]]]
"""From a text, and whether special tokens are added, to token ids."""


@dataclass(frozen=True)
class Window:
    """One request: the tokens from index ``first_scored`` on are scored, each given all before it.

    ``prompt`` is a text only where the endpoint has no tokenizer; then its first token is not scored.
    """

    prompt: tuple[int, ...] | str
    first_scored: int
    document: int = 0


def cut_chunks(
    tokens: Sequence[int],
    bos: Sequence[int],
    context_tokens: int,
    max_chunks: int | None,
    stride_tokens: int | None = None,
) -> list[list[int]]:
    """Cut token ids into chunks of ``context_tokens``, each with the BOS first; one begins every ``stride_tokens``.

    Without a stride they do not overlap. A shorter chunk at the end is dropped unless it is the only one.

    Raises:
        BadInputError: the context or the text is too short to score anything, or the stride does not fit.
    """
    step = context_tokens - len(bos)
    if step < 2:
        raise BadInputError(f"a context of {context_tokens} tokens leaves nothing to score")
    if len(tokens) + len(bos) < 2:
        raise BadInputError(f"the text has {len(tokens)} tokens, too few to score")
    if stride_tokens is not None and stride_tokens > step:
        raise BadInputError(f"a stride of {stride_tokens} tokens leaves gaps: chunks hold {step} tokens of the text")
    starts = range(0, max(1, len(tokens) - step + 1), stride_tokens or step)
    return [[*bos, *tokens[start : start + step]] for start in starts[:max_chunks]]


def step128_windows(
    tokens: Sequence[int],
    bos: Sequence[int],
    context_tokens: int,
    max_chunks: int | None,
    stride_tokens: int | None = None,
) -> list[Window]:
    """Of each chunk of :func:`cut_chunks` the tokens are scored that the one before it did not hold."""
    step = context_tokens - len(bos)
    chunks = cut_chunks(tokens, bos, context_tokens, max_chunks, stride_tokens)
    overlap = step - (stride_tokens or step)
    return [Window(tuple(chunk), max(1, len(bos) + (overlap if number else 0))) for number, chunk in enumerate(chunks)]


def llama_cpp_windows(
    tokens: Sequence[int], bos: Sequence[int], context_tokens: int, max_chunks: int | None
) -> list[Window]:
    """As llama.cpp's ``llama-perplexity --ctx-size N`` (tools/perplexity/perplexity.cpp, function ``perplexity``).

    The text is tokenized with its BOS; of each chunk the first token is *replaced* by the BOS, and the logits of the
    positions N/2 to N-2 are used: the tokens N/2+1 to N-1 are scored.

    Raises:
        BadInputError: the text is shorter than two chunks, which the tool refuses too.
    """
    if len(bos) > 1:
        raise BadInputError(f"llama.cpp puts one BOS before a text, this tokenizer {len(bos)}: {list(bos)}")
    if context_tokens < 3:
        raise BadInputError(f"a context of {context_tokens} tokens leaves nothing to score")
    stream = [*bos, *tokens]
    if len(stream) < 2 * context_tokens:
        raise BadInputError(
            f"the text has {len(stream)} tokens with its BOS; llama.cpp's definition needs two chunks, "
            f"{2 * context_tokens} tokens. Use --context-tokens {max(3, len(stream) // 2)} or less, or a longer text."
        )
    starts = range(0, len(stream) - context_tokens + 1, context_tokens)
    first = context_tokens // 2 + 1
    return [
        Window((*(bos or stream[start : start + 1]), *stream[start + 1 : start + context_tokens]), first)
        for start in starts[:max_chunks]
    ]


def lm_eval_windows(tokens: Sequence[int], prefix: int, context_tokens: int, document: int) -> list[Window]:
    """As lm-evaluation-harness' rolling log-likelihood of one document (``get_rolling_token_windows``, context 1).

    Each token is scored once. The first window begins with the prefix token, any other with the last token of the one
    before; the last is filled up with earlier tokens, as context, to the full length.

    Raises:
        BadInputError: the context is too short.
    """
    if context_tokens < 2:
        raise BadInputError(f"a context of {context_tokens} tokens leaves nothing to score")
    stream, most = [prefix, *tokens], context_tokens - 1
    windows = []
    for start in range(1, len(stream), most):
        end = min(start + most, len(stream))
        begin = max(0, end - context_tokens)
        windows.append(Window(tuple(stream[begin:end]), start - begin, document))
    return windows


def text_pieces(text: str, characters: int, max_chunks: int | None) -> list[Window]:
    """Pieces of at most so many characters, cut before a white space where there is one: for want of a tokenizer."""
    windows: list[Window] = []
    start = 0
    while start < len(text) and (max_chunks is None or len(windows) < max_chunks):
        end = min(start + characters, len(text))
        if end < len(text):
            space = max(text.rfind(" ", start + 1, end + 1), text.rfind("\n", start + 1, end + 1))
            end = space if space > start else end
        windows.append(Window(text[start:end], 1))
        start = end
    return windows


async def find_bos(tokenize: Tokenize) -> tuple[int, ...]:
    """The tokens that a tokenizer puts before a text (usually one, or none).

    Raises:
        EvalError: they cannot be told from the text.
    """
    plain, special = await tokenize("a", False), await tokenize("a", True)
    for length in range(len(special) - len(plain) + 1):
        if special[length : length + len(plain)] == plain:
            return tuple(special[:length])
    raise EvalError(f"the tokenizer's special tokens cannot be told from the text: {plain} became {special}")
