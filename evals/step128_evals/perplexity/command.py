"""``ppl``: perplexity of a text, and top-k KL against a reference run."""

from __future__ import annotations

import argparse
import asyncio
import math
from pathlib import Path
from typing import Any

from step128_evals.client import Client
from step128_evals.evaluation import Evaluation, run_evaluation
from step128_evals.harness import Task
from step128_evals.options import Parsers, Result, add_endpoint_command, add_results, count
from step128_evals.perplexity.documents import SEPARATORS, read_documents
from step128_evals.perplexity.endpoint import EndpointScorer
from step128_evals.perplexity.plan import Plan, PlanOptions, make_plan
from step128_evals.perplexity.reference import Reference, read_reference, tokens_sha256
from step128_evals.perplexity.scoring import Scorer
from step128_evals.perplexity.topk import MAX_TOP_K, pack_floats, pack_tops
from step128_evals.perplexity.windows import DEFINITIONS, STEP128
from step128_evals.probe import probe_endpoint
from step128_evals.runs import Item


def add_parser(commands: Parsers) -> None:
    """Register the command."""
    ppl = add_endpoint_command(
        commands, "ppl", "perplexity of a text from prompt log-probabilities, and top-k KL against a reference", run
    )
    text = ppl.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", metavar="FILE", help="UTF-8; - is standard input")
    text.add_argument(
        "--dataset",
        metavar="NAME[:CONFIG[:SPLIT]]",
        help="of the Hugging Face hub, or a local file (jsonl, json, parquet, csv, txt) or folder; a row is a document",
    )
    ppl.add_argument("--field", default="text", help="of the data set's rows (default: %(default)s)")
    ppl.add_argument("--documents", type=count, metavar="N", help="the first N (default: all)")
    ppl.add_argument(
        "--separator", choices=SEPARATORS, default="blank-line", help="between documents, but for lm-eval (%(default)s)"
    )
    ppl.add_argument("--definition", choices=DEFINITIONS, default=STEP128, help="of perplexity (default: %(default)s)")
    ppl.add_argument(
        "--context-tokens",
        type=count,
        default=2048,
        metavar="N",
        help="of a chunk, with its BOS (default: %(default)s)",
    )
    ppl.add_argument(
        "--stride",
        type=count,
        metavar="N",
        help="start a chunk every N tokens and score only the new ones (default: no overlap)",
    )
    ppl.add_argument("--max-chunks", type=count, metavar="N", help="score no more than the first N chunks")
    ppl.add_argument(
        "--prefix-token", metavar="ID|TEXT", help="of lm-eval (default: the tokenizer's BOS token, else its EOS token)"
    )
    ppl.add_argument(
        "--top-k",
        type=_top_k,
        metavar="N",
        help="keep the N likeliest tokens of each position, so that this run can be a reference (about 130 bytes a "
        "position at 20; default: 0, with --reference as many as it has)",
    )
    ppl.add_argument("--reference", type=Path, metavar="FILE.jsonl", help="an earlier run with --top-k: KL(it || this)")
    ppl.add_argument("--local", type=Path, metavar="DIR", help="score by transformers instead of an endpoint")
    ppl.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of --local")
    ppl.add_argument("--device", metavar="NAME", help="of --local (default: a GPU if there is one)")
    add_results(ppl)


async def run(parsed: argparse.Namespace, client: Client) -> Result:
    """Probe or load, plan, score, summarize."""
    documents = await asyncio.to_thread(read_documents, parsed.text, parsed.dataset, parsed.field, parsed.documents)
    reference = read_reference(parsed.reference) if parsed.reference else None
    top_k = parsed.top_k or (reference.top_k if reference else 0)
    scorer = await _scorer(parsed, client, top_k)
    plan = await make_plan(documents, scorer, _options(parsed))
    settings = plan.settings | scorer.settings | {"chunks": len(plan.windows), "top_k": top_k}
    if reference:
        reference.check(settings, plan.ids)
        settings["reference"] = reference.identity
    tasks = _tasks(plan, scorer, top_k, reference)
    return await run_evaluation(parsed, scorer.endpoint, Evaluation("ppl", "chunks", settings, tasks))


def _options(parsed: argparse.Namespace) -> PlanOptions:
    return PlanOptions(
        definition=parsed.definition,
        context_tokens=parsed.context_tokens,
        stride_tokens=parsed.stride,
        max_chunks=parsed.max_chunks,
        separator=parsed.separator,
        prefix_token=parsed.prefix_token,
    )


async def _scorer(parsed: argparse.Namespace, client: Client, top_k: int) -> Scorer:
    if parsed.local:
        from step128_evals.perplexity.local import load_local

        return await asyncio.to_thread(load_local, parsed.local, parsed.dtype, parsed.device)
    endpoint = await probe_endpoint(client, parsed.model, only=("tokenize", "prompt_logprobs"))
    endpoint.require("prompt_logprobs")
    scorer = EndpointScorer(client, endpoint)
    if top_k:
        await scorer.require_top(top_k)
    return scorer


def _tasks(plan: Plan, scorer: Scorer, top_k: int, reference: Reference | None) -> list[Task]:
    def task(number: int, id: str) -> Task:
        return Task(id, lambda: _ask(plan, number, id, scorer, top_k, reference))

    return [task(number, id) for number, id in enumerate(plan.ids)]


async def _ask(plan: Plan, number: int, id: str, scorer: Scorer, top_k: int, reference: Reference | None) -> Item:
    window = plan.windows[number]
    scores = await scorer.score(window, top_k)
    nll = [-logprob for logprob in scores.logprobs]
    data: dict[str, Any] = {
        "nll": math.fsum(nll),
        "positions": len(nll),
        "first_scored": window.first_scored,
        "document": window.document,
        "tokens_sha256": tokens_sha256(window.prompt),
        "token_nll": pack_floats(nll),
    }
    if plan.sizes:
        words, size_bytes, windows = plan.sizes[window.document]
        data |= {"document_words": words, "document_bytes": size_bytes, "document_windows": windows}
    if top_k:
        data["top"] = pack_tops(scores.top)
    if reference:
        data["kl"] = reference.compare(id, window.prompt, scores)
    return Item(id, "measured", data=data)


def _top_k(text: str) -> int:
    value = int(text)
    if not 0 <= value <= MAX_TOP_K:
        raise argparse.ArgumentTypeError(f"must be from 0 to {MAX_TOP_K}")
    return value
