"""``vision``: questions about pictures drawn on the spot, and the same questions without the pictures."""

from __future__ import annotations

import argparse
import base64
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from step128_evals.chat import ChatRequest, ask_chat
from step128_evals.client import Client
from step128_evals.errors import EvalError, UnsupportedError
from step128_evals.evaluation import Evaluation, run_evaluation
from step128_evals.harness import Task
from step128_evals.options import Parsers, Result, add_endpoint_command, add_results, count
from step128_evals.probe import probe_endpoint
from step128_evals.runs import Item
from step128_evals.vision.answers import RULE, final_answer, find_failure
from step128_evals.vision.drawing import SMALL, Canvas, Picture
from step128_evals.vision.item import Question
from step128_evals.vision.questions import SEED, make_questions, questions_sha256, save_images

BLIND = "blind"
_REFUSALS = (400, 413, 415, 422)
"""HTTP statuses that say: not such a request. Any other failure may be over the next time."""


def add_parser(commands: Parsers) -> None:
    """Register the command."""
    text = "charts, text, shapes and pairs of pictures with exact answers; how it answers without the pictures, beside"
    parser = add_endpoint_command(commands, "vision", text, _run)
    add_results(parser, concurrency=4)
    parser.add_argument(
        "--sets", type=count, default=1, metavar="N", help="of 82 questions, all different (default: %(default)s)"
    )
    parser.add_argument("--no-blind", action="store_true", help="do not ask the same questions without the pictures")
    parser.add_argument(
        "--max-tokens", type=count, default=2048, metavar="N", help="of an answer, reasoning included; %(default)s"
    )
    parser.add_argument("--reasoning-effort", choices=["low", "medium", "high"])
    parser.add_argument("--save-images", type=Path, metavar="DIR", help="write the pictures and questions here first")


@dataclass(frozen=True)
class _Asking:
    """``no_pairs``: why the endpoint takes no two pictures in one request; None if it does."""

    client: Client
    model: str
    request: dict[str, Any]
    no_pairs: str | None

    async def ask(self, id: str, question: Question, blind: bool) -> Item:
        if self.no_pairs is not None and len(question.pictures) > 1 and not blind:
            raise UnsupportedError(self.no_pairs)
        content = _content(question.text, () if blind else question.pictures)
        answer = await ask_chat(self.client, self.model, ChatRequest(content, **self.request))
        said = final_answer(answer.text)
        failure = find_failure(answer, question.answer, question.kind)
        data = {
            "category": question.category,
            "blind": blind,
            "question": question.text,
            "kind": question.kind,
            "expected": question.answer,
            "said": said,
            "failure": failure,
            "pictures": [{"sha256": p.sha256, "width": p.width, "height": p.height} for p in question.pictures],
            "largest_side_pixels": question.largest_side,
            "answer": asdict(answer),
        }
        why = f"{failure}: {said[:80]!r} instead of {question.answer!r}" if failure else ""
        return Item(id, "failed" if failure else "passed", why, data)


def _content(text: str, pictures: tuple[Picture, ...]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"}}
        for picture in pictures
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]


async def _run(parsed: argparse.Namespace, client: Client) -> Result:
    if parsed.save_images:
        saved = save_images(make_questions(parsed.sets), parsed.save_images)
        print(f"{saved} pictures are in {parsed.save_images}", file=sys.stderr)
    endpoint = await probe_endpoint(client, parsed.model, only=("chat", "streaming", "images"))
    endpoint.require("chat", "images")
    questions = make_questions(parsed.sets)
    request = {
        "max_tokens": parsed.max_tokens,
        "reasoning_effort": parsed.reasoning_effort,
        "stream": endpoint.can("streaming"),
    }
    asking = _Asking(client, endpoint.model, request, await _why_no_pairs(client, endpoint.model))
    tasks = [Task(q.id, partial(asking.ask, q.id, q, False)) for q in questions]
    if not parsed.no_blind:
        tasks += [Task(f"{q.id}.{BLIND}", partial(asking.ask, f"{q.id}.{BLIND}", q, True)) for q in questions]
    settings = {
        "sets": parsed.sets,
        "seed": SEED,
        "questions": len(questions),
        "questions_sha256": questions_sha256(questions),
        "blind": not parsed.no_blind,
        "max_tokens": parsed.max_tokens,
        "reasoning_effort": parsed.reasoning_effort,
        "rule": RULE,
    }
    return await run_evaluation(parsed, endpoint, Evaluation("vision", "questions", settings, tasks))


async def _why_no_pairs(client: Client, model: str) -> str | None:
    """Ask about two pictures at once: a server may be started for one a request only.

    Raises:
        EvalError: it failed otherwise than by refusing them, which says nothing of pairs.
    """
    pictures = (Canvas(SMALL).picture(),) * 2
    try:
        await ask_chat(client, model, ChatRequest(_content("What is this?", pictures), max_tokens=4))
    except EvalError as error:
        if error.status not in _REFUSALS:
            raise
        return f"unsupported: two pictures in one request: {error}"
    return None
