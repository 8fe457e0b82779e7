"""``smoke``: does the endpoint work at all."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from step128_evals.client import Client
from step128_evals.errors import EvalError
from step128_evals.metrics import describe
from step128_evals.options import Parsers, Result, add_endpoint_command, count
from step128_evals.smoke import VISION_CAVEAT, SmokeOptions, run_smoke


def add_parser(commands: Parsers) -> None:
    """Register the command."""
    smoke = add_endpoint_command(commands, "smoke", "one question, one image, one tool call", _smoke)
    defaults = SmokeOptions()
    smoke.add_argument("--question", default=defaults.question)
    smoke.add_argument("--image-question", default=defaults.image_question)
    smoke.add_argument("--tool-question", default=defaults.tool_question, help="should make the model call get_weather")
    smoke.add_argument("--max-tokens", type=count, default=defaults.max_tokens, metavar="N")
    smoke.add_argument("--reasoning-effort", choices=["low", "medium", "high"])
    smoke.add_argument("--no-image", action="store_true", help="leave the image out")
    smoke.add_argument("--vision-plumbing-only", action="store_true", help="the vision tower is not trained: say so")


async def _smoke(parsed: argparse.Namespace, client: Client) -> Result:
    out = sys.stderr if parsed.json else sys.stdout

    def say(text: str) -> None:
        print(text, end="", file=out, flush=True)

    model = await client.model(parsed.model)
    options = SmokeOptions(
        question=parsed.question,
        image_question=None if parsed.no_image else parsed.image_question,
        tool_question=parsed.tool_question,
        max_tokens=parsed.max_tokens,
        reasoning_effort=parsed.reasoning_effort,
        vision_plumbing_only=parsed.vision_plumbing_only,
    )
    result = await run_smoke(client, model.name, options, say)
    say("\n" + describe(result.acceptance) + "\n")
    report = asdict(result) | {"passed": result.passed}
    for part, row in zip(result.parts, report["parts"], strict=True):
        for answer, entry in zip(part.answers, row["answers"], strict=True):
            entry["tokens_per_second"] = answer.tokens_per_second
    report["vision_caveat"] = VISION_CAVEAT if parsed.vision_plumbing_only else None
    failed = [part.name for part in result.parts if part.problem]
    say("all parts passed\n" if result.passed else f"failed: {', '.join(failed)}\n")
    return report, 0 if result.passed else EvalError.exit_code
