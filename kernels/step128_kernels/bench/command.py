"""``step128-kernels bench``: correctness first, then times against vLLM's kernels and a copy."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from step128_kernels.bench.measure import Machine, Outcome, Task, measure
from step128_kernels.bench.report import Setting, document, sentences, table
from step128_kernels.errors import KernelToolError
from step128_kernels.tune.options import parsed_shape
from step128_kernels.tuned.names import expanded

_SUMMARY = "time our kernels against vLLM's and a copy on this GPU, correctness first"
_DESCRIPTION = f"""{_SUMMARY}.

Every kernel is compared with a float32 reference before anything is timed; while one is wrong, nothing is timed or
compared and the command ends with 70. The last line on stdout is one JSON document; the table and all else is on
stderr. Other work on the GPU spoils the times."""
_ROWS = (1, 4, 8, 32, 512)
_WRONG = 70


class NoGpuError(KernelToolError):
    """There is nothing to measure on."""

    exit_code = 4


def add_parser(commands: Any, epilog: str) -> None:
    """Add ``bench`` to the commands of ``step128-kernels``."""
    parser = commands.add_parser(
        "bench",
        help=_SUMMARY,
        description=_DESCRIPTION,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kernel", action="append", metavar="NAME", help="only this kernel, such as nl4_gemm; attention is two of them"
    )
    parser.add_argument("--m", type=_rows, default=_ROWS, metavar="M,…", help="activation rows (default: 1,4,8,32,512)")
    parser.add_argument(
        "--shape", action="append", type=parsed_shape, metavar="N=…,K=…", help="only this shape; default: all we ship"
    )
    only = parser.add_argument_group("attention")
    only.add_argument("--attention", action="store_true", help="--kernel attention_fp8, attention_bf16")
    only.add_argument(
        "--context", type=_rows, default=(), metavar="N,…", help="tokens of a sequence (default: 1k, 8k, 64k, 200k)"
    )
    only.add_argument("--q-len", type=_rows, default=(1, 4), metavar="N,…", help="query tokens of it (default: 1,4)")
    only.add_argument("--batch", type=_rows, default=(1, 8), metavar="N,…", help="sequences (default: 1,8)")
    parser.add_argument("--json", action="store_true", help="no table, only the JSON document")
    parser.set_defaults(run=run, ends_with_json=True)


def run(parsed: argparse.Namespace) -> int:
    """Measure what was asked for; returns the exit code.

    Raises:
        KernelToolError: nothing can be measured.
    """
    return bench(*_prepare(parsed), quiet=parsed.json)


def bench(tasks: Sequence[Task], machine: Machine, setting: Setting, quiet: bool) -> int:
    """Measure and print; returns the exit code.

    Args:
        tasks: what to measure.
        machine: what runs them.
        setting: for the report.
        quiet: no table.
    """
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
    with _bar(console) as bar:
        steps = {name: bar.add_task(name, total=len(tasks)) for name in ("check", "time")}
        outcome: Outcome = measure(tasks, machine, lambda name: bar.advance(steps[name]))
    exit_code = 0 if outcome.correct else _WRONG
    if not quiet:
        console.print(table(outcome, setting))
    for sentence in sentences(outcome, setting):
        print(sentence, file=sys.stderr)
    sys.stderr.flush()
    print(json.dumps(document(outcome, setting, exit_code), allow_nan=False), flush=True)
    return exit_code


def _bar(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True)


def _prepare(parsed: argparse.Namespace) -> tuple[list[Task], Machine, Setting]:
    """This machine and what to do on it.

    Raises:
        KernelToolError: something is missing, or there is no such kernel or shape.
    """
    from step128_kernels.offline.compile import require_triton

    require_triton()
    from step128_kernels.bench.attention import Batches
    from step128_kernels.bench.selection import select_tasks
    from step128_kernels.gpu import this_gpu, versions

    kernels = [*(parsed.kernel or ()), *(("attention",) if parsed.attention else ())]
    batches = Batches(parsed.context, parsed.q_len, parsed.batch)
    tasks = select_tasks(expanded(kernels), parsed.shape, parsed.m, batches)
    gpu = this_gpu()
    if gpu is None:
        raise NoGpuError(
            "bench measures on a GPU, and torch sees none here. Nothing was measured. "
            "`step128-kernels inspect` says without one what the kernels cost."
        )
    from step128_kernels.bench.gpu import GpuMachine, find_vllm
    from step128_kernels.bench.timing import METHOD, time_call, time_copy

    vllm = find_vllm()
    setting = Setting(
        device=gpu.name,
        arch=gpu.arch,
        driver=gpu.driver or nvidia_driver(),
        versions=versions(),
        date=datetime.now(UTC).date().isoformat(),
        method=METHOD,
        vllm_missing=vllm.missing,
    )
    return tasks, GpuMachine(vllm, time_call, time_copy), setting


def nvidia_driver(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of NVIDIA's kernel driver, or None without one."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", path.read_text())
    except OSError:
        return None
    return None if found is None else f"nvidia {found[0]}"


def _rows(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers above 0; one looks like 1,4,8")
    return tuple(dict.fromkeys(map(int, parts)))
