"""``step128-kernels bench``: correctness first, then times against vLLM's kernels and a copy."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from step128_kernels.bench.measure import Machine, Outcome, Task, measure
from step128_kernels.bench.report import Setting, document, sentences, table
from step128_kernels.command_options import check_kernels
from step128_kernels.errors import KernelToolError
from step128_kernels.tune.options import UsageError, check_shape, parsed_shape

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
    parser.add_argument("--kernel", action="append", metavar="NAME", help="only this kernel, such as nl4_gemm")
    parser.add_argument("--m", type=_rows, default=_ROWS, metavar="M,…", help="activation rows (default: 1,4,8,32,512)")
    parser.add_argument(
        "--shape", action="append", type=parsed_shape, metavar="N=…,K=…", help="only this shape; default: all we ship"
    )
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
    from step128_kernels.cases import SHAPES
    from step128_kernels.gpu import this_gpu, versions

    tasks = select_tasks(SHAPES, parsed.kernel, parsed.shape, parsed.m)
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


def select_tasks(
    shipped: Mapping[str, Sequence[Mapping[str, int]]],
    kernels: Sequence[str] | None,
    shapes: Sequence[Mapping[str, int]] | None,
    rows: Sequence[int],
) -> list[Task]:
    """What to measure, a shape's tasks side by side so that its weights are made once.

    Args:
        shipped: shapes by kernel.
        kernels: those wanted; None for all.
        shapes: those wanted, of one kernel; None for all that are shipped.
        rows: activation rows wanted.

    Raises:
        NoSuchKernelError: a kernel is not known.
        UsageError: a shape lacks a dimension, belongs to no single kernel, or is that of no layer.
    """
    chosen = list(dict.fromkeys(kernels or shipped))
    check_kernels(chosen, shipped)
    if shapes:
        chosen = [name for name in chosen if all(shape.keys() == shipped[name][0].keys() for shape in shapes)]
    if not chosen:
        known = "; ".join(f"{name}: {','.join(f'{key}=…' for key in all_[0])}" for name, all_ in shipped.items())
        raise UsageError(f"--shape fits no kernel; their dimensions are {known}")
    for name in chosen:
        for shape in shapes or ():
            check_shape(name, shape)
    return [Task(name, shape, m) for name in chosen for shape in shapes or shipped[name] for m in rows]


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
        raise argparse.ArgumentTypeError(f"{text!r} is no list of row counts; one looks like 1,4,8")
    return tuple(dict.fromkeys(map(int, parts)))
