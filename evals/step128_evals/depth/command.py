"""``depth``: cells of depth x requests at once, each repeated."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from step128_evals.acceptance.material import python_code
from step128_evals.chat import SEED
from step128_evals.client import Client
from step128_evals.depth.measure import Cell, Meter
from step128_evals.depth.prompts import PromptMaker
from step128_evals.errors import BadInputError, UnsupportedError
from step128_evals.evaluation import Evaluation, run_evaluation
from step128_evals.files import sha256
from step128_evals.harness import Task
from step128_evals.options import Parsers, Result, add_endpoint_command, add_results, count, counts
from step128_evals.probe import Endpoint, probe_endpoint
from step128_evals.runs import Item

DEPTHS = "0,8k,32k,64k,128k,200k"
_TEXT = "time to first token, prefill and decode speed by depth of the context and requests at once"
_UNKNOWN_CONTEXT_LIMIT = 32 * 1024


def add_parser(commands: Parsers) -> None:
    """Register the command."""
    parser = add_endpoint_command(commands, "depth", _TEXT, run)
    add_results(parser, concurrency=None)
    parser.add_argument(
        "--depths",
        type=counts,
        metavar="N,N",
        help=f"tokens, prompt and answer (default: {DEPTHS}, as far as they fit)",
    )
    parser.add_argument("--concurrencies", type=counts, default=[1, 4, 8], metavar="N,N", help="default: 1,4,8")
    parser.add_argument("--output-tokens", type=count, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--cached", action="store_true", help="measure with a prompt in the prefix cache too")


async def run(parsed: argparse.Namespace, client: Client) -> Result:
    """Measure all cells; depths beyond the context are unsupported."""
    wanted = ("chat", "streaming", "completions", "tokenize", "metrics")
    endpoint = await probe_endpoint(client, parsed.model, only=wanted)
    prompts = PromptMaker(client, endpoint)
    if not prompts.exact:
        endpoint.require("streaming")
    context = endpoint.max_context_tokens
    depths = _depths(parsed.depths, parsed.output_tokens, context)
    concurrencies = sorted({max(number, 1) for number in parsed.concurrencies})
    fitting = [depth for depth in depths if context is None or max(depth, parsed.output_tokens) <= context]
    cells = [
        Cell(kind, depth, concurrency, repeat, parsed.output_tokens)
        for repeat in range(parsed.repeats)  # outermost, so that what changes with time changes every cell
        for depth in fitting
        for concurrency in concurrencies
        for kind in (("cold", "cached") if parsed.cached and depth > 2 * parsed.output_tokens else ("cold",))
    ]
    settings = {
        "depths": depths,
        "context_tokens": context,
        "concurrencies": concurrencies,
        "output_tokens": parsed.output_tokens,
        "repeats": parsed.repeats,
        "cached": parsed.cached,
        "exact": prompts.exact,
        "seed": SEED,  # of the requests and headers; a nonce makes the headers new in each process, see PromptMaker
        "text_sha256": sha256(python_code()),
    }
    warm_up = min(2048, max((cell.prompt_tokens for cell in cells), default=0))
    meter = Meter(client, endpoint, prompts, concurrencies[-1], warm_up)
    tasks = [Task(cell.id, partial(meter.measure, cell)) for cell in cells]
    tasks += [_beyond(depth, endpoint) for depth in depths if depth not in fitting]
    prompt_tokens = sum(cell.prompt_tokens * cell.concurrency for cell in cells)
    print(f"{len(cells)} cells with {prompt_tokens:,} prompt tokens in all", file=sys.stderr)
    return await run_evaluation(parsed, endpoint, Evaluation("depth", "cells", settings, tasks))


def _depths(wanted: list[int] | None, output_tokens: int, context: int | None) -> list[int]:
    """Each once; by default those that leave room for a prompt, and are not too bold for an unknown context.

    Raises:
        BadInputError: the answer alone is as long as a wanted depth.
    """
    if wanted is None:
        limit = _UNKNOWN_CONTEXT_LIMIT if context is None else None
        fitting = (d for d in counts(DEPTHS) if limit is None or d <= limit)
        return [depth for depth in fitting if not 0 < depth <= output_tokens]
    if short := [str(depth) for depth in wanted if 0 < depth <= output_tokens]:
        raise BadInputError(
            f"an answer of {output_tokens} tokens leaves no prompt at depth {', '.join(short)}: choose deeper --depths "
            "or smaller --output-tokens (depth 0 measures a prompt of its header alone)"
        )
    return list(dict.fromkeys(wanted))


def _beyond(depth: int, endpoint: Endpoint) -> Task:
    async def ask() -> Item:
        raise UnsupportedError(f"depth {depth} is beyond the server's context of {endpoint.max_context_tokens} tokens")

    return Task(f"cold.depth-{depth}", ask)
