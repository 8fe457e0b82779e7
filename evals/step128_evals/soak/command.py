"""``soak --minutes N``: mixed load, then verdicts; an interrupted soak goes on with the minutes that are left."""

from __future__ import annotations

import argparse
import sys

from step128_evals.chat import SEED
from step128_evals.client import Client
from step128_evals.depth.prompts import PromptMaker
from step128_evals.errors import BadInputError, EvalError
from step128_evals.evaluation import report_run
from step128_evals.options import Parsers, Result, add_endpoint_command, add_results, count, progress, results_path
from step128_evals.probe import Endpoint, probe_endpoint
from step128_evals.runs import Manifest, open_results
from step128_evals.soak.plan import WEIGHTS, Plan
from step128_evals.soak.requests import Asker
from step128_evals.soak.session import Session

_TEXT = (
    "minutes of mixed load: no error, no leak, no drift. An interrupted soak goes on with the minutes that are left; "
    "the pause is marked, and what was in flight is lost"
)
_LONG_LIMIT_TOKENS = 8192
_LONG_SHARE = 0.5


def add_parser(commands: Parsers) -> None:
    """Register the command."""
    parser = add_endpoint_command(commands, "soak", _TEXT, run)
    add_results(parser, concurrency=8)
    parser.add_argument("--minutes", type=_minutes, default=10.0, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--max-tokens", type=count, default=128, metavar="N", help="of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--long-tokens", type=count, metavar="N", help="of the longest prompt (default: half the context, 8192 at most)"
    )
    parser.add_argument(
        "--kinds", type=_kinds, metavar="A,B", help=f"default: what the server takes of {','.join(WEIGHTS)}"
    )
    parser.add_argument("--canary-seconds", type=_seconds, default=15.0, metavar="N", help="default: %(default)s")
    parser.add_argument("--sample-seconds", type=_seconds, default=5.0, metavar="N", help="default: %(default)s")


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _seconds(text: str) -> float:
    return _minutes(text)


def _kinds(text: str) -> tuple[str, ...]:
    chosen = text.split(",")
    if unknown := set(chosen) - set(WEIGHTS):
        raise argparse.ArgumentTypeError(f"no kind is called {', '.join(sorted(unknown))}; {', '.join(WEIGHTS)} are")
    return tuple(kind for kind in WEIGHTS if kind in chosen)


async def run(parsed: argparse.Namespace, client: Client) -> Result:
    """Load the server for so many minutes; exit code 70 if a verdict is that it failed."""
    wanted = ("chat", "streaming", "completions", "tokenize", "tools", "images", "metrics")
    endpoint = await probe_endpoint(client, parsed.model, only=wanted)
    endpoint.require("chat")
    context = endpoint.max_context_tokens
    long_tokens = parsed.long_tokens or min(_LONG_LIMIT_TOKENS, int((context or _LONG_LIMIT_TOKENS) * _LONG_SHARE))
    if context is not None and long_tokens + parsed.max_tokens > context:
        raise BadInputError(
            f"{long_tokens} prompt tokens and {parsed.max_tokens} generated ones do not fit into the server's context "
            f"of {context}: choose smaller --long-tokens or --max-tokens"
        )
    plan = Plan(parsed.minutes * 60, parsed.concurrency, _taken(parsed.kinds, endpoint), SEED)
    settings = {
        "minutes": parsed.minutes,
        "concurrency": parsed.concurrency,
        "kinds": list(plan.kinds),
        "max_tokens": parsed.max_tokens,
        "long_tokens": long_tokens,
        "canary_seconds": parsed.canary_seconds,
        "sample_seconds": parsed.sample_seconds,
        "seed": SEED,
    }
    manifest = Manifest("soak", endpoint.model, endpoint.base_url, settings, endpoint.as_dict())
    results = open_results(results_path(parsed, "soak", endpoint.model), manifest, parsed.fresh)
    if results.items:
        print(f"{results.path} is there already: this goes on where it ended; --fresh begins anew", file=sys.stderr)
    prompts = PromptMaker(client, endpoint)
    asker = Asker(client, endpoint, prompts, parsed.max_tokens, long_tokens)
    with progress("seconds") as on_second:
        session = Session(plan, asker, results, parsed.canary_seconds, parsed.sample_seconds, on_second)
        await session.run()
    report, code = report_run(results.run, parsed.json)
    return report, EvalError.exit_code if report["verdicts_failed"] else code


def _taken(chosen: tuple[str, ...] | None, endpoint: Endpoint) -> tuple[str, ...]:
    """The kinds that the server takes, of those that were chosen.

    Raises:
        UnsupportedError: a kind was chosen that it does not take.
    """
    needs = {"tools": "tools", "image": "images", "cancelled": "streaming", "chat": "streaming"}
    for kind in chosen or ():
        if kind in needs:
            endpoint.require(needs[kind])
    return chosen or tuple(kind for kind in WEIGHTS if kind not in needs or endpoint.can(needs[kind]))
