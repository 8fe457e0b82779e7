"""``needle``: can the model copy what it was given, wherever it stands in the context."""

from __future__ import annotations

import argparse
from pathlib import Path

from step128_evals.client import Client
from step128_evals.errors import BadInputError
from step128_evals.evaluation import run_evaluation
from step128_evals.needle.codeneedle.mode import codeneedle_evaluation
from step128_evals.needle.corrected_mode import corrected_evaluation
from step128_evals.options import Parsers, Result, add_endpoint_command, add_results, count, counts, results_path
from step128_evals.probe import probe_endpoint

DEPTHS = "0,11,22,33,44,56,67,78,89,100"


def add_parser(commands: Parsers) -> None:
    """Register the command."""
    needle = add_endpoint_command(commands, "needle", "copy functions out of a long context, exactly", _run)
    needle.add_argument("--mode", choices=["step128", "codeneedle"], default="step128", help="default: %(default)s")
    add_results(needle)
    needle.add_argument(
        "--max-tokens",
        type=count,
        metavar="N",
        help="of an answer, reasoning included (default: 4096, at most a quarter of the context; codeneedle: 6000)",
    )
    needle.add_argument("--reasoning-effort", choices=["low", "medium", "high"], help="default: the server's")
    ours = needle.add_argument_group("--mode step128")
    ours.add_argument("--items", type=count, default=100, metavar="N", help="functions asked (default: %(default)s)")
    ours.add_argument("--lines", type=count, default=20, metavar="N", help="of each function (default: %(default)s)")
    ours.add_argument(
        "--lengths", type=counts, metavar="N,N", help="prompt tokens, 8k,32k say (default: up to the full context)"
    )
    ours.add_argument(
        "--depths", type=counts, default=counts(DEPTHS), metavar="N,N", help=f"in percent (default: {DEPTHS})"
    )
    ours.add_argument(
        "--corpus",
        type=Path,
        metavar="FOLDER",
        help="Python files (default: this Python's standard library, which models have seen in training)",
    )
    ours.add_argument(
        "--closed-book", action="store_true", help="ask the same without the haystack: what the model knows by heart"
    )
    theirs = needle.add_argument_group("--mode codeneedle")
    theirs.add_argument("--codeneedle", type=Path, metavar="FOLDER", help="your clone of the benchmark")
    theirs.add_argument(
        "--codeneedle-corpus", default="jquery", metavar="NAME", help="of its configs/corpora (default: %(default)s)"
    )
    theirs.add_argument("--think", action="store_true", help="leave its /no_think out")


async def _run(parsed: argparse.Namespace, client: Client) -> Result:
    if parsed.mode == "step128" and parsed.codeneedle is not None:
        raise BadInputError("--codeneedle belongs to --mode codeneedle")
    endpoint = await probe_endpoint(client, parsed.model, only=("chat", "streaming", "tokenize"))
    endpoint.require("chat")
    if parsed.mode == "codeneedle":
        evaluation = await codeneedle_evaluation(parsed, client, endpoint)
        kind = f"needle.codeneedle-{parsed.codeneedle_corpus}"
    else:
        evaluation = await corrected_evaluation(parsed, client, endpoint)
        kind = "needle.closed-book" if parsed.closed_book else "needle"
    parsed.out = results_path(parsed, kind, endpoint.model)
    return await run_evaluation(parsed, endpoint, evaluation)
