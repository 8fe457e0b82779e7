"""The definitions of perplexity in words, with their sources: a perplexity without them compares with nothing."""

from __future__ import annotations

from typing import Any

from step128_evals.perplexity.windows import LLAMA_CPP, LM_EVAL, STEP128

SOURCES = {
    STEP128: "`step128-eval ppl` itself; `step128-checkpoint perplexity` cuts a text alike",
    LLAMA_CPP: "llama.cpp, tools/perplexity/perplexity.cpp, function `perplexity` (in llama-cpp-python 0.3.36)",
    LM_EVAL: "lm-evaluation-harness 0.4.13, `loglikelihood_rolling` of models/api_models.py, metrics of api/task.py",
}
"""Where each definition is from."""


def describe(settings: dict[str, Any]) -> str:
    """State in words what is computed by a run of these settings."""
    how = {STEP128: _step128, LLAMA_CPP: _llama_cpp, LM_EVAL: _lm_eval}
    return how[settings["definition"]](settings)


def _joined(settings: dict[str, Any]) -> str:
    if settings["documents"] == 1:
        return "text"
    between = "nothing" if settings["separator"] == "none" else f"a {settings['separator'].replace('-', ' ')}"
    return f"{settings['documents']} documents joined by {between},"


def _step128(settings: dict[str, Any]) -> str:
    bos: list[int] = settings["bos_token_ids"]
    context, stride = settings["context_tokens"], settings["stride_tokens"]
    if stride is None:
        return (
            f"{_joined(settings)} cut into pieces of {settings['piece_characters']} characters, about {context} "
            "tokens; the endpoint has no tokenizer; the server itself puts a BOS before each or does not; the first "
            "token of each is not scored; exp of the mean over scored tokens"
        )
    if stride != context - len(bos):
        cut = _overlapping(context, stride, bos)
    elif bos:
        cut = (
            f"non-overlapping chunks of {context} tokens in all; each chunk starts with the tokenizer's own BOS {bos} "
            "and every text token is scored"
        )
    else:
        cut = (
            f"non-overlapping chunks of {context} tokens in all; the tokenizer has no BOS, so the first token of each "
            "chunk is not scored"
        )
    return (
        f"{_joined(settings)} tokenized once, without special tokens; {cut}; a shorter chunk at the end is dropped "
        "unless it is the only one; exp of the mean over scored tokens"
    )


def _overlapping(context: int, stride: int, bos: list[int]) -> str:
    start = f"each starts with the tokenizer's own BOS {bos}" if bos else "the tokenizer has no BOS"
    first = "all text tokens" if bos else "all tokens but its first"
    return (
        f"overlapping chunks of {context} tokens in all, one every {stride} tokens; {start}; of the first chunk "
        f"{first} are scored, of any other the last {stride}, which the one before did not hold"
    )


def _llama_cpp(settings: dict[str, Any]) -> str:
    context, bos = settings["context_tokens"], settings["bos_token_ids"]
    start = f"the first token of each is replaced by the BOS {bos}" if bos else "the tokenizer adds no BOS"
    return (
        f"as llama.cpp's llama-perplexity --ctx-size {context}: {_joined(settings)} tokenized once; chunks of "
        f"{context} tokens, {start}; only the second half is scored, {context - context // 2 - 1} tokens of each; a "
        "shorter chunk at the end is dropped; exp of the mean over scored tokens"
    )


def _lm_eval(settings: dict[str, Any]) -> str:
    context = settings["context_tokens"]
    return (
        f"as lm-evaluation-harness' rolling log-likelihood (local-completions with max_length={context + 1}, hf with "
        f"max_length={context - 1} and add_bos_token=False): each document by itself, those of "
        "nothing but white space left out (the harness counts them), "
        f"tokenized without special tokens; windows of {context} tokens, the first beginning with the prefix token "
        f"{settings['prefix_token_id']}, any other with the token before it; each token is scored once, and the last "
        "window is filled up with context; words are what white space parts, bytes are UTF-8; a task's own rewriting "
        "of the text (WikiText's detokenizer, say) is not done"
    )
