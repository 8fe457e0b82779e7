"""``acceptance``: asks the prompts of each domain, one after the other, and reads the counters around each."""

from __future__ import annotations

import argparse
from contextlib import suppress
from functools import partial

from step128_evals.acceptance.material import (
    DOMAINS,
    Sizes,
    domain_prompts,
    fingerprint,
    text_prompts,
    with_bos,
)
from step128_evals.acceptance.measure import measure_prompt
from step128_evals.chat import SEED
from step128_evals.client import Client
from step128_evals.completion import complete
from step128_evals.errors import BadInputError, EvalError
from step128_evals.evaluation import Evaluation, run_evaluation
from step128_evals.files import read_text_argument
from step128_evals.harness import Task
from step128_evals.metrics import read_at_rest, read_metrics
from step128_evals.options import Parsers, Result, add_endpoint_command, add_results, count, results_path
from step128_evals.perplexity.windows import find_bos
from step128_evals.probe import Endpoint, probe_endpoint
from step128_evals.tokens import tokenize_with

_TEXT = "MTP acceptance by position, by domain, from the server's counters; nothing else may use it meanwhile"
_LONG_LIMIT_TOKENS = 32 * 1024
_LONG_SHARE = 0.75
_WARM_UP = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, "
_WARM_UP_TOKENS = 32


def add_parser(commands: Parsers) -> None:
    """Register the command."""
    parser = add_endpoint_command(commands, "acceptance", _TEXT, run)
    add_results(parser, concurrency=None)  # the counters do not tell requests apart
    parser.add_argument(
        "--domains", type=_domains, default=DOMAINS, metavar="A,B", help=f"default: {','.join(DOMAINS)}"
    )
    parser.add_argument("--text", metavar="FILE", help="one domain `text` instead: pieces of this file; - reads stdin")
    parser.add_argument("--prompts", type=count, default=16, metavar="N", help="of each domain (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=count, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--long-prompts", type=count, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--long-tokens", type=count, metavar="N", help="default: three quarters of the context, 32768 at most"
    )
    parser.add_argument(
        "--max-tokens", type=count, default=128, metavar="N", help="to generate for each prompt (default: %(default)s)"
    )


def _domains(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if unknown := set(chosen) - set(DOMAINS):
        raise argparse.ArgumentTypeError(f"no domain is called {', '.join(sorted(unknown))}; {', '.join(DOMAINS)} are")
    return tuple(domain for domain in DOMAINS if domain in chosen)


async def run(parsed: argparse.Namespace, client: Client) -> Result:
    """Measure; a server without drafts is measured too, as MTP 0, for `mtp-depth` to compare with."""
    text = read_text_argument(parsed.text) if parsed.text else None
    wanted = ("chat", "streaming", "completions", "tokenize", "metrics", "speculative_decoding")
    endpoint = await probe_endpoint(client, parsed.model, only=wanted)
    endpoint.require("metrics", "completions", "tokenize")
    domains = ("text",) if text is not None else parsed.domains
    sizes = _sizes(parsed, endpoint, domains)

    async def tokenize(part: str, special: bool = False) -> list[int]:
        return await tokenize_with(client, endpoint.how("tokenize"), endpoint.model, part, special)

    prompts = await text_prompts(text, sizes, tokenize) if text is not None else []
    for domain in domains if text is None else ():
        prompts += await domain_prompts(domain, sizes, tokenize)
    bos = await find_bos(tokenize)
    prompts = with_bos(prompts, bos)
    depth = await _drafted_depth(client, endpoint, await tokenize(_WARM_UP))
    settings = {
        "num_speculative_tokens": depth,
        "domains": list(domains),
        "prompts": sizes.prompts,
        "prompt_tokens": sizes.prompt_tokens,
        "long_prompts": sizes.long_prompts if "long" in domains else None,
        "long_tokens": sizes.long_tokens if "long" in domains else None,
        "max_tokens": parsed.max_tokens,
        "bos_token_ids": list(bos),
        "seed": SEED,
        "sha256": fingerprint(prompts),
    }
    # Each depth has a file of its own, since `mtp-depth` wants them side by side.
    parsed.out = results_path(parsed, f"acceptance-mtp{'-unknown' if depth is None else depth}", endpoint.model)
    tasks = [
        Task(prompt.id, partial(measure_prompt, client, endpoint, prompt, parsed.max_tokens)) for prompt in prompts
    ]
    return await run_evaluation(parsed, endpoint, Evaluation("acceptance", "prompts", settings, tasks))


async def _drafted_depth(client: Client, endpoint: Endpoint, warm_up: list[int]) -> int | None:
    """Tokens drafted a step, as the server tells; llama.cpp tells only after it drafted, so it is made to."""
    counters = await read_metrics(client)
    if counters and counters.num_speculative_tokens is None and counters.drafts:
        with suppress(EvalError):  # the prompts will say what is wrong
            await complete(client, endpoint.model, warm_up, _WARM_UP_TOKENS)
        counters = await read_at_rest(client)
    return counters.num_speculative_tokens if counters else None


def _sizes(parsed: argparse.Namespace, endpoint: Endpoint, domains: tuple[str, ...]) -> Sizes:
    """Check that what is asked fits.

    Raises:
        BadInputError: a prompt and its answer are longer than the context.
    """
    context = endpoint.max_context_tokens
    long_tokens = parsed.long_tokens or min(_LONG_LIMIT_TOKENS, int((context or _LONG_LIMIT_TOKENS) * _LONG_SHARE))
    longest = long_tokens if "long" in domains else 0
    if set(domains) & {"code", "prose", "text"}:
        longest = max(longest, parsed.prompt_tokens)
    if context is not None and longest + parsed.max_tokens > context:
        raise BadInputError(
            f"a prompt of {longest} tokens and {parsed.max_tokens} generated ones do not fit into the server's context "
            f"of {context}: choose smaller --prompt-tokens, --long-tokens or --max-tokens"
        )
    return Sizes(parsed.prompts, parsed.prompt_tokens, parsed.long_prompts, long_tokens, SEED)
