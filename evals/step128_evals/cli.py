"""``step128-eval``: checks a server over HTTP. Each command parses, awaits one function, and prints."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from step128_evals.acceptance import measure_acceptance
from step128_evals.client import Client
from step128_evals.errors import BadInputError, ConfigurationError, EvalError, InputNotFoundError, PermissionDeniedError
from step128_evals.metrics import Acceptance
from step128_evals.perplexity import measure_perplexity
from step128_evals.smoke import VISION_CAVEAT, SmokeOptions, run_smoke

EXIT_CODES = """exit codes:
  0 all passed    1 internal error    2 wrong usage    5 the server refuses the API key, or a file may not be read
  65 unusable text    66 file not found    69 no server answers    70 the server answers, but not as it should
  78 unusable API key or address    130 interrupted"""

Report = dict[str, Any]
Command = Callable[[argparse.Namespace, Client], Awaitable[tuple[Report, int]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        report, code = asyncio.run(_run(parsed))
    except EvalError as error:
        report, code = {"error": str(error)}, error.exit_code
    except ExceptionGroup as group:
        known = [error for error in group.exceptions if isinstance(error, EvalError)]
        report, code = ({"error": str(known[0])}, known[0].exit_code) if known else _internal(group)
    except KeyboardInterrupt:
        report, code = {"error": "interrupted"}, 130
    except Exception as error:
        report, code = _internal(error)
    if parsed.json:
        print(json.dumps(report | {"exit_code": code}))
    if "error" in report:
        print(f"step128-eval: {report['error']}", file=sys.stderr)
    return code


def _internal(error: Exception) -> tuple[Report, int]:
    traceback.print_exception(error)
    return {"error": f"internal error: {error!r}; please report it with the lines above"}, 1


async def _run(parsed: argparse.Namespace) -> tuple[Report, int]:
    command: Command = parsed.run
    async with Client(parsed.base_url, _api_key(parsed.api_key_file)) as client:
        return await command(parsed, client)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="step128-eval",
        description="Check a server that speaks the OpenAI API.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    smoke = _command(commands, "smoke", _smoke, "one question, one image, one tool call")
    defaults = SmokeOptions()
    smoke.add_argument("--question", default=defaults.question)
    smoke.add_argument("--image-question", default=defaults.image_question)
    smoke.add_argument("--tool-question", default=defaults.tool_question, help="should make the model call get_weather")
    smoke.add_argument("--max-tokens", type=_count, default=defaults.max_tokens, metavar="N")
    smoke.add_argument("--reasoning-effort", choices=["low", "medium", "high"])
    smoke.add_argument("--no-image", action="store_true", help="leave the image out")
    smoke.add_argument("--vision-plumbing-only", action="store_true", help="the vision tower is not trained: say so")

    ppl = _command(commands, "ppl", _perplexity, "perplexity of a text, from prompt log-probabilities")
    _add_text(ppl)
    ppl.add_argument("--context-tokens", type=_count, default=2048, metavar="N", help="chunk length (default 2048)")
    ppl.add_argument("--max-chunks", type=_count, metavar="N", help="score no more than N chunks")
    ppl.add_argument("--concurrency", type=_count, default=1, metavar="N", help="requests in flight (default 1)")

    acceptance = _command(commands, "acceptance", _acceptance, "MTP acceptance by position on a held-out text")
    _add_text(acceptance)
    acceptance.add_argument("--prompts", type=_count, default=8, metavar="N")
    acceptance.add_argument("--prompt-tokens", type=_count, default=128, metavar="N")
    acceptance.add_argument("--max-tokens", type=_count, default=128, metavar="N", help="tokens to generate for each")
    return parser


def _command(commands: Any, name: str, run: Command, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="default: %(default)s")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="default: the environment's VLLM_API_KEY")
    parser.add_argument("--model", metavar="NAME", help="default: the first one that is served")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.set_defaults(run=run)
    return parser


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", required=True, metavar="FILE", help="a UTF-8 text file, or - for standard input")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _api_key(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get("VLLM_API_KEY", "").strip() or None
    key = _read(path).strip()
    if not key:
        raise ConfigurationError(f"{path}: the API key file is empty")
    return key


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        kinds: dict[type[OSError], type[EvalError]] = {
            FileNotFoundError: InputNotFoundError,
            PermissionError: PermissionDeniedError,
        }
        raise kinds.get(type(error), BadInputError)(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path}: not UTF-8 text: {error}") from error


def _text(argument: str) -> str:
    return sys.stdin.read() if argument == "-" else _read(Path(argument))


async def _smoke(parsed: argparse.Namespace, client: Client) -> tuple[Report, int]:
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
    say("\n" + _describe(result.acceptance) + "\n")
    report = asdict(result) | {"passed": result.passed}
    for part, row in zip(result.parts, report["parts"], strict=True):
        for answer, entry in zip(part.answers, row["answers"], strict=True):
            entry["tokens_per_second"] = answer.tokens_per_second
    report["vision_caveat"] = VISION_CAVEAT if parsed.vision_plumbing_only else None
    failed = [part.name for part in result.parts if part.problem]
    say("all parts passed\n" if result.passed else f"failed: {', '.join(failed)}\n")
    return report, 0 if result.passed else EvalError.exit_code


async def _perplexity(parsed: argparse.Namespace, client: Client) -> tuple[Report, int]:
    text = _text(parsed.text)
    model = await client.model(parsed.model)
    with _progress("chunks") as on_chunk:
        result = await measure_perplexity(
            client, model, text, parsed.context_tokens, parsed.max_chunks, parsed.concurrency, on_chunk
        )
    positions = sum(result.chunk_positions)
    if not parsed.json:
        print(f"perplexity {result.perplexity:.4f} ({result.nll_per_token:.5f} nats a token)")
        print(f"{positions} scored tokens in {len(result.chunk_nll)} chunks of {parsed.text}, model {result.model}")
        print(f"definition: {result.definition}")
    figures = {"perplexity": result.perplexity, "nll_per_token": result.nll_per_token, "scored_tokens": positions}
    return figures | asdict(result) | {"text": parsed.text}, 0


async def _acceptance(parsed: argparse.Namespace, client: Client) -> tuple[Report, int]:
    text = _text(parsed.text)
    model = await client.model(parsed.model)
    with _progress("prompts") as on_prompt:
        result = await measure_acceptance(
            client, model.name, text, parsed.prompts, parsed.prompt_tokens, parsed.max_tokens, on_prompt
        )
    if not parsed.json:
        print(_describe(result.acceptance))
        print(
            f"{result.generated_tokens} tokens from {result.prompts} prompts, {result.tokens_per_second:.1f} tokens/s"
        )
    extra = {
        "tokens_per_second": result.tokens_per_second,
        "mean_accepted_length": result.acceptance.mean_accepted_length,
    }
    return asdict(result) | extra, 0


def _describe(acceptance: Acceptance | None) -> str:
    if acceptance is None:
        return "MTP: nothing was drafted"
    rates = ", ".join(f"position {i}: {rate:.3f}" for i, rate in enumerate(acceptance.rates, start=1))
    return (
        f"MTP acceptance over {acceptance.drafts} drafts: {rates}; {acceptance.mean_accepted_length:.2f} tokens a step"
    )


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal; gives ``on_item(done, total)``."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(unit, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
