"""``reasoning``: do the levels of ``reasoning_effort`` change how much is thought, and does it help."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from functools import partial

from step128_evals.chat import ChatRequest, ask_chat, split_reasoning
from step128_evals.client import Client
from step128_evals.errors import BadInputError, EvalError, UnsupportedError
from step128_evals.evaluation import Evaluation, run_evaluation
from step128_evals.files import sha256
from step128_evals.harness import Task
from step128_evals.options import Parsers, Result, add_endpoint_command, add_results, count
from step128_evals.probe import Endpoint, probe_endpoint
from step128_evals.reasoning.problems import Problem, is_correct, make_problems
from step128_evals.reasoning.switch import refused, thought_of
from step128_evals.runs import Item
from step128_evals.tokens import tokenize_with

LEVELS = ("low", "medium", "high")
_REQUIRED = ("chat", "streaming", "reasoning_effort")
_MOST_TOKENS = 16384
_PROMPT_TOKENS = 1024
"""Room for the question in the endpoint's context."""


def add_parser(commands: Parsers) -> None:
    """Register the command."""
    parser = add_endpoint_command(commands, "reasoning", "do low, medium and high change the amount of thinking", _run)
    add_results(parser, concurrency=4)
    parser.add_argument(
        "--problems", type=count, default=24, metavar="N", help="each asked at each level (default: %(default)s)"
    )
    parser.add_argument(
        "--levels", type=_levels, default=list(LEVELS), metavar="NAMES", help="some of low,medium,high; default: all"
    )
    parser.add_argument(
        "--max-tokens",
        type=count,
        metavar="N",
        help=f"of an answer with its reasoning; default: {_MOST_TOKENS}, or what the context has room for",
    )


def _levels(text: str) -> list[str]:
    names = text.split(",")
    if set(names) - set(LEVELS):
        raise argparse.ArgumentTypeError(f"there are {', '.join(LEVELS)}")
    return [level for level in LEVELS if level in names]


@dataclass(frozen=True)
class _Asking:
    """``dialect`` of the endpoint's tokenizer, None without one."""

    client: Client
    model: str
    max_tokens: int
    dialect: str | None

    async def ask(self, id: str, problem: Problem, level: str) -> Item:
        messages = [{"role": "user", "content": problem.question}]
        request = ChatRequest(messages, max_tokens=self.max_tokens, reasoning_effort=level)
        try:
            answer = await ask_chat(self.client, self.model, request)
        except EvalError as error:
            if refused(error):
                raise UnsupportedError(str(error)) from error
            raise
        thought = thought_of(answer)
        tokenized = None
        if self.dialect is not None:
            tokenized = len(await tokenize_with(self.client, self.dialect, self.model, thought)) if thought else 0
        correct = is_correct(problem, split_reasoning(answer.text)[1])
        data = {
            "problem": problem.id,
            "kind": problem.kind,
            "level": level,
            "expected": problem.answer,
            "correct": correct,
            "reasoning": {
                "usage_tokens": answer.reasoning_tokens,
                "tokenizer_tokens": tokenized,
                "characters": len(thought),
            },
            "leaked": "<think>" in answer.text or "</think>" in answer.text,
            "truncated": answer.finish_reason == "length",
            "answer": asdict(answer),
        }
        return Item(id, "passed" if correct else "failed", "" if correct else f"not {problem.answer}", data)


async def _run(parsed: argparse.Namespace, client: Client) -> Result:
    endpoint = await probe_endpoint(client, parsed.model, (*_REQUIRED, "tokenize"))
    endpoint.require(*_REQUIRED)
    max_tokens = _max_tokens(parsed, endpoint)
    dialect = endpoint.how("tokenize") if endpoint.can("tokenize") else None
    asking = _Asking(client, endpoint.model, max_tokens, dialect)
    problems = make_problems(parsed.problems)
    tasks = [
        Task(id, partial(asking.ask, id, problem, level))
        for problem in problems
        for level in parsed.levels
        for id in (f"{problem.id}.{level}",)
    ]
    print(f"reasoning: {len(problems)} problems x {len(parsed.levels)} levels = {len(tasks)} items", file=sys.stderr)
    settings = {
        "problems": len(problems),
        "problems_sha256": sha256(json.dumps([asdict(problem) for problem in problems])),
        "levels": parsed.levels,
        "max_tokens": max_tokens,
    }
    return await run_evaluation(parsed, endpoint, Evaluation("reasoning", "questions", settings, tasks))


def _max_tokens(parsed: argparse.Namespace, endpoint: Endpoint) -> int:
    context = endpoint.max_context_tokens
    room = _MOST_TOKENS if context is None else context - _PROMPT_TOKENS
    wanted = int(parsed.max_tokens or min(_MOST_TOKENS, room))
    if context is not None and not 0 < wanted <= room:
        raise BadInputError(
            f"the context of {context} tokens has no room for a question of up to {_PROMPT_TOKENS} and "
            f"--max-tokens {parsed.max_tokens or 1}"
        )
    return wanted
