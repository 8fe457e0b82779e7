"""``--mode codeneedle``: the benchmark's questions, asked as it asks them."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from step128_evals.chat import ChatRequest, ask_chat
from step128_evals.client import Client
from step128_evals.errors import BadInputError, EvalError, UnsupportedError
from step128_evals.evaluation import Evaluation
from step128_evals.files import sha256
from step128_evals.harness import Task
from step128_evals.needle.codeneedle import clone
from step128_evals.needle.codeneedle.scoring import count_lines, relaxed, strict
from step128_evals.needle.codeneedle.targets import Target, draw, find_targets
from step128_evals.probe import Endpoint
from step128_evals.runs import Item
from step128_evals.tokens import tokenize_with

MAX_TOKENS = 6000


async def codeneedle_evaluation(parsed: argparse.Namespace, client: Client, endpoint: Endpoint) -> Evaluation:
    """Settings and tasks, from the user's clone.

    Raises:
        BadInputError: no clone was named, or it cannot be used.
        UnsupportedError: the corpus does not fit into the endpoint's context.
    """
    if parsed.codeneedle is None:
        raise BadInputError(
            "--mode codeneedle needs a clone of the benchmark, which has no licence that would let us ship its texts: "
            f"`{clone.COMMAND}`, then --codeneedle codeneedle"
        )
    template = clone.read_template(parsed.codeneedle)
    corpus = clone.read_corpus(parsed.codeneedle, parsed.codeneedle_corpus)
    source = corpus.source
    targets = draw(
        _in_source(find_targets(corpus.text, corpus.language, corpus.path.name)),
        source.count("\n") + 1,
        corpus.count,
        corpus.seed,
    )
    if not targets:
        raise BadInputError(f"{corpus.path} has no function of 20 lines")
    max_tokens = parsed.max_tokens or MAX_TOKENS
    await _require_context(client, endpoint, source, max_tokens)
    settings = {
        "mode": "codeneedle",
        "commit": clone.commit_of(parsed.codeneedle),
        "template_sha256": template.sha256,
        "corpus": corpus.name,
        "corpus_sha256": sha256(corpus.text),
        "functions": [target.name for target in targets],
        "seed": corpus.seed,
        "no_think": not parsed.think,
        "max_tokens": max_tokens,
        "reasoning_effort": parsed.reasoning_effort,
    }

    def task(target: Target) -> Task:
        async def ask() -> Item:
            content = template.fill(source, corpus.language, target.name, len(target.asked), not parsed.think)
            request = ChatRequest(
                [{"role": "user", "content": content}],
                max_tokens=max_tokens,
                reasoning_effort=parsed.reasoning_effort,
                seed=None,  # the benchmark sends none
                stream=False,
            )
            return await _ask(client, endpoint.model, target, request)

        return Task(target.name, ask)

    return Evaluation("needle", "functions", settings, [task(target) for target in targets])


def _in_source(targets: list[Target]) -> list[Target]:
    """The heading line comes before the file."""
    return [Target(target.name, target.start_line + 1, target.body) for target in targets]


async def _ask(client: Client, model: str, target: Target, request: ChatRequest) -> Item:
    answer = await ask_chat(client, model, request)
    if not answer.text.strip():
        # The benchmark leaves such an item out of its score, too.
        raise EvalError(
            f"{target.name}: an empty answer after {answer.tokens} tokens (finish reason {answer.finish_reason}); "
            "a reasoning model may need a larger --max-tokens"
        )
    counts = count_lines(target.asked, target.bonus, answer.text, strict)
    beside = count_lines(target.asked, target.bonus, answer.text, relaxed)
    why = "" if counts.passed else f"{counts.matched} of {counts.asked} lines"
    data = {
        "start_line": target.start_line,
        "asked": target.asked,
        "bonus": target.bonus,
        "answer": answer.text,
        "reasoning": answer.reasoning,
        "finish_reason": answer.finish_reason,
        "prompt_sha256": sha256(str(request.messages[0]["content"])),
        "prompt_tokens": answer.prompt_tokens,
        "answer_tokens": answer.tokens,
        "total_seconds": answer.total_seconds,
        "strict": asdict(counts) | {"passed": counts.passed},
        "relaxed": asdict(beside) | {"passed": beside.passed},
    }
    return Item(target.name, "passed" if counts.passed else "failed", why, data)


async def _require_context(client: Client, endpoint: Endpoint, source: str, max_tokens: int) -> None:
    context = endpoint.max_context_tokens
    if context is None or not endpoint.can("tokenize"):
        return  # then the first answer tells
    needed = len(await tokenize_with(client, endpoint.how("tokenize"), endpoint.model, source)) + max_tokens
    if needed > context:
        raise UnsupportedError(
            f"unsupported: the corpus and an answer of {max_tokens} tokens need {needed} tokens of context, and "
            f"{endpoint.model} is served with {context}. The smallest corpus is http_server "
            "(--codeneedle-corpus); a smaller answer: --max-tokens N."
        )
