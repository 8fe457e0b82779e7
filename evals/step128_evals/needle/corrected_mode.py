"""``--mode step128``: 100 functions at all depths of prompts up to the full context, copied exactly or failed."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from step128_evals.chat import SEED, ChatRequest, ask_chat
from step128_evals.client import Client
from step128_evals.corpus import Corpus, python_corpus
from step128_evals.errors import BadInputError
from step128_evals.evaluation import Evaluation
from step128_evals.files import sha256
from step128_evals.harness import Task
from step128_evals.needle.lengths import answer_budget, prompt_lengths
from step128_evals.needle.plan import Plan, PlannedItem, plan_items, template_tokens
from step128_evals.needle.question import question
from step128_evals.needle.scoring import SCORING_VERSION, answer_lines, invented_lines, score_lines
from step128_evals.needle.segments import Shelf
from step128_evals.probe import Endpoint
from step128_evals.runs import Item
from step128_evals.tokens import find_counter


async def corrected_evaluation(parsed: argparse.Namespace, client: Client, endpoint: Endpoint) -> Evaluation:
    """Settings and tasks.

    Raises:
        UnsupportedError: the context is too small for the lengths.
        BadInputError: the corpus is too small, or a depth is no percentage.
    """
    if max(parsed.depths) > 100:
        raise BadInputError("--depths are percentages, 0 to 100")
    depths = sorted(set(parsed.depths))
    answer_tokens = answer_budget(parsed.max_tokens, endpoint.max_context_tokens)
    lengths = prompt_lengths(parsed.lengths, endpoint.max_context_tokens, answer_tokens)
    for length in sorted(set(parsed.lengths or []) - set(lengths)):
        print(
            f"{length} tokens and an answer of {answer_tokens} are more than the context of "
            f"{endpoint.max_context_tokens}: prompts have {lengths[-1]} tokens instead",
            file=sys.stderr,
        )
    corpus = python_corpus(parsed.corpus)
    dialect = endpoint.how("tokenize") if endpoint.can("tokenize") else None
    counter = await find_counter(client, endpoint.model, dialect, _sample(corpus, lengths[0]))
    plan = await plan_items(
        Shelf(corpus, counter, parsed.lines, SEED),
        counter,
        lengths,
        depths,
        parsed.items,
        parsed.lines,
        await template_tokens(client, endpoint.model, counter),
    )
    _report(plan, counter.exact)
    questions = [question(item.placed.function, parsed.lines, parsed.closed_book) for item in plan.items]
    settings = {
        "mode": "step128",
        "corpus": corpus.label,
        "corpus_sha256": corpus.sha256,
        "items": parsed.items,
        "planned": len(plan.items),
        "lines": parsed.lines,
        "lengths": lengths,
        "depths": depths,
        "depth_tolerance_percent": plan.tolerance_percent,
        "seed": SEED,
        "haystacks_sha256": list(dict.fromkeys(item.haystack.sha256 for item in plan.items)),
        "questions_sha256": sha256("".join(f"{i.id}\0{q}\0" for i, q in zip(plan.items, questions, strict=True))),
        "scoring": SCORING_VERSION,
        "token_counts": "the server's own" if counter.exact else "estimated",
        "max_tokens": answer_tokens,
        "reasoning_effort": parsed.reasoning_effort,
        "closed_book": parsed.closed_book,
    }

    def task(item: PlannedItem, text: str) -> Task:
        async def ask() -> Item:
            request = ChatRequest(
                [{"role": "user", "content": text if parsed.closed_book else item.haystack.text + text}],
                max_tokens=answer_tokens,
                reasoning_effort=parsed.reasoning_effort,
                stream=endpoint.can("streaming"),
            )
            counted = None if parsed.closed_book else item.counted_tokens
            return await _ask(client, endpoint.model, item, request, parsed.lines, counted)

        return Task(item.id, ask)

    return Evaluation(
        "needle", "functions", settings, [task(*each) for each in zip(plan.items, questions, strict=True)]
    )


def _sample(corpus: Corpus, characters: int) -> str:
    """Pieces from the middle of some files: what stands at a file's beginning has longer tokens than code."""
    files = corpus.files[:: max(1, len(corpus.files) // 16)]
    return "".join(file.text[len(file.text) // 2 :][: characters // len(files)] for file in files)


def _report(plan: Plan, exact: bool) -> None:
    """Say on standard error what is not as it was asked."""
    for length, missing in plan.missing.items():
        print(
            f"prompts of {length} tokens hold no function for {missing} of their items within "
            f"{plan.tolerance_percent:g} % of the wanted depths",
            file=sys.stderr,
        )
    if not exact:
        print("the server has no tokenizer route: lengths are estimated, 10 % below what was asked", file=sys.stderr)


async def _ask(
    client: Client, model: str, item: PlannedItem, request: ChatRequest, lines: int, counted: int | None
) -> Item:
    answer = await ask_chat(client, model, request)
    function = item.placed.function
    asked, said = function.body[:lines], answer_lines(answer.text)
    invented = invented_lines(function.lines, said)
    scores = score_lines(asked, said, invented)
    data: dict[str, Any] = {
        "length": item.length_tokens,
        "depth": item.depth_percent,
        "actual_depth": round(100 * item.placed.depth, 2),
        "counted_prompt_tokens": counted,
        "prompt_tokens": answer.prompt_tokens,
        "haystack_sha256": item.haystack.sha256,
        "file": function.file,
        "function": function.name,
        "signature": function.signature,
        "asked": asked,
        "answer": answer.text,
        "reasoning": answer.reasoning,
        "finish_reason": answer.finish_reason,
        "answer_tokens": answer.tokens,
        "first_token_seconds": answer.first_token_seconds,
        "total_seconds": answer.total_seconds,
        "scores": {name: asdict(score) for name, score in scores.items()},
        "invented_lines": invented,
    }
    return Item(
        item.id, "passed" if scores["exact"].passed else "failed", _why(scores, invented, answer.finish_reason), data
    )


def _why(scores: dict[str, Any], invented: int, finish_reason: str) -> str:
    if scores["exact"].passed:
        return ""
    forgiven = [name for name in ("rstrip", "strip") if scores[name].passed]
    but = f"; passes under {forgiven[0]}" if forgiven else ""
    cut = "; the answer's budget ended it (--max-tokens)" if finish_reason == "length" else ""
    more = f"; {invented} lines are not the function's" if invented else ""
    return f"{scores['exact'].lines} lines are exact{but}{more}{cut}"
