"""Options that commands share, and how a command that asks an endpoint is run."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from step128_evals.client import Client
from step128_evals.errors import ConfigurationError
from step128_evals.files import read_text

EXIT_CODES = """exit codes:
  0 measured, or all passed     1 internal error            2 wrong usage
  3 gate: a threshold is missed 4 the endpoint lacks what the eval needs
  5 the server refuses the API key, or a file may not be read
  65 unusable file              66 file not found           69 no server answers
  70 the server answers, but not as it should (some items ended in an error; the others are kept)
  73 cannot write               78 unusable API key or address   130 interrupted"""

Report = dict[str, Any]
Result = tuple[Report, int]
Parsers = Any
"""What ``add_subparsers`` returns; argparse keeps its type to itself."""


def add_command(
    commands: Parsers, name: str, text: str, run: Callable[[argparse.Namespace], Result]
) -> argparse.ArgumentParser:
    """A command with ``--json``; ``run`` gives the report that ``--json`` prints, and the exit code."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.set_defaults(run=run)
    return parser


def add_endpoint_command(
    commands: Parsers, name: str, text: str, run: Callable[[argparse.Namespace, Client], Awaitable[Result]]
) -> argparse.ArgumentParser:
    """A command that asks an endpoint."""

    def with_client(parsed: argparse.Namespace) -> Result:
        return asyncio.run(_ask(parsed, run))

    parser = add_command(commands, name, text, with_client)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="default: %(default)s")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="default: the environment's VLLM_API_KEY")
    parser.add_argument("--model", metavar="NAME", help="default: the first one that is served")
    parser.add_argument(
        "--timeout-seconds", type=count, default=3600, metavar="N", help="without a piece of an answer (%(default)s)"
    )
    return parser


async def _ask(parsed: argparse.Namespace, run: Callable[[argparse.Namespace, Client], Awaitable[Result]]) -> Result:
    async with Client(parsed.base_url, read_api_key(parsed.api_key_file), parsed.timeout_seconds) as client:
        return await run(parsed, client)


def add_results(parser: argparse.ArgumentParser, concurrency: int | None = 1) -> None:
    """The options of an eval that keeps its items in a result file; ``concurrency`` None: always one at a time."""
    parser.add_argument(
        "--out", type=Path, metavar="FILE.jsonl", help="default: results/EVAL.MODEL.jsonl; a run goes on where it ended"
    )
    parser.add_argument("--fresh", action="store_true", help="measure anew; what is there stays as FILE.jsonl.old")
    if concurrency is None:
        parser.set_defaults(concurrency=1)
    else:
        parser.add_argument(
            "--concurrency",
            type=count,
            default=concurrency,
            metavar="N",
            help="requests in flight (default: %(default)s)",
        )


def results_path(parsed: argparse.Namespace, eval_name: str, model: str) -> Path:
    """Where a run's items go."""
    slug = re.sub(r"[^\w.-]+", "_", model).strip("._") or "model"
    return parsed.out or Path("results") / f"{eval_name}.{slug}.jsonl"


def count(text: str) -> int:
    """An argument type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def counts(text: str) -> list[int]:
    """An argument type: integers of at least 0, ``1,4,8`` say; ``8k`` is 8192."""
    values = [int(part[:-1]) * 1024 if part[-1:].lower() == "k" else int(part) for part in text.split(",")]
    if not values or min(values) < 0:
        raise argparse.ArgumentTypeError("must be numbers of at least 0, with commas between them")
    return values


def read_api_key(path: Path | None) -> str | None:
    """The key in a file, or in the environment; None without either.

    Raises:
        ConfigurationError: the file is empty.
    """
    if path is None:
        return os.environ.get("VLLM_API_KEY", "").strip() or None
    key = read_text(path).strip()
    if not key:
        raise ConfigurationError(f"{path}: the API key file is empty")
    return key


@contextmanager
def progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal; gives ``on_item(done, total)``."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
