"""``step128-kernels inspect``: what every shipped kernel costs, for people as tables and for programs as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from step128_kernels.errors import KernelToolError, NoSuchKernelError
from step128_kernels.launch import KernelCase
from step128_kernels.offline.compile import require_triton
from step128_kernels.offline.cost import DEVICES
from step128_kernels.offline.inspect import Report, case_title, report_json
from step128_kernels.offline.parallel import inspect_cases

_SUMMARY = "compile every shipped kernel with no GPU and count what it costs"
_DESCRIPTION = f"""{_SUMMARY}.

Registers, spills, LDS and occupancy are the compiler's; instructions are counted over the whole call, loops by their
trip counts. Bandwidth bounds come from a cost model (kernels/README.md, "Cost model"): modelled, not measured."""


def add_parser(commands: Any, epilog: str) -> None:
    """Add ``inspect`` to the commands of ``step128-kernels``."""
    parser = commands.add_parser(
        "inspect",
        help=_SUMMARY,
        description=_DESCRIPTION,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", choices=sorted(DEVICES), help="default: both")
    parser.add_argument("--kernel", metavar="NAME", help="only this kernel, such as nl4_gemm")
    parser.add_argument("--phase", choices=["decode", "prefill"], help="default: both")
    parser.add_argument("--jobs", type=_count, metavar="N", help="processes (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Inspect what was asked for and print it."""
    cases = select_cases(parsed.arch, parsed.kernel, parsed.phase)
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("compiling and counting", total=len(cases))
        results = inspect_cases(cases, parsed.jobs, lambda count: progress.advance(task, count))
    reports = [result for result in results if isinstance(result, Report)]
    if parsed.json:
        print(json.dumps([report_json(report) for report in reports]))
    else:
        _print_tables(reports)
    failed = [
        (case, result) for case, result in zip(cases, results, strict=True) if isinstance(result, KernelToolError)
    ]
    for case, error in failed:
        print(f"step128-kernels: {case_title(case)}: {error}", file=sys.stderr)
    return max((error.exit_code for _, error in failed), default=0)


def select_cases(arch: str | None, kernel: str | None, phase: str | None) -> list[KernelCase]:
    """Shipped cases that fit.

    Raises:
        NoSuchKernelError: none does; the message names what there is.
    """
    require_triton()
    from step128_kernels.cases import all_cases

    everything = list(all_cases(arch, None))
    cases = [case for case in everything if kernel in (None, case.kernel) and phase in (None, case.phase)]
    if not cases:
        known = sorted({f"{case.kernel} ({case.phase})" for case in everything})
        raise NoSuchKernelError(f"no shipped kernel is {kernel or 'any'} ({phase or 'any phase'}); there are {known}")
    return cases


def _print_tables(reports: Sequence[Report]) -> None:
    console = Console(width=None if sys.stdout.isatty() else max(160, _columns()))
    groups: dict[tuple[str, ...], list[Report]] = {}
    for report in reports:
        case = report.case
        names = "/".join(case.shape), "/".join(case.config)
        groups.setdefault((case.arch, case.kernel, case.phase, *names), []).append(report)
    for (arch, kernel, phase, shape, config), chosen in sorted(groups.items()):
        device = DEVICES[arch]
        table = Table(
            title=f"{kernel} {phase} on {arch} ({device.name}, {device.memory_bytes_per_second / 1e9:.0f} GB/s)",
            caption=f"config: {config}\ninstructions: {_mix(chosen)}",
            caption_justify="left",
        )
        table.add_column(shape)
        table.add_column("config", overflow="fold")
        for heading in ("VGPR", "SGPR", "spills", "LDS", "waves/SIMD", "VALU/weight", "inst/B", "WMMA"):
            table.add_column(heading, justify="right")
        for heading in ("weight loads", "bound GB/s*", "of card*"):
            table.add_column(heading, justify="right")
        for report in chosen:
            table.add_row(*_row(report))
        console.print(table)
    console.print(
        "* modelled, not measured: what instructions alone allow; expect 50-75 % of it. "
        "Above 100 % memory is the limit."
    )
    assumed = sorted({text for report in reports for one in report.launches for text in one.assumptions})
    if assumed:
        console.print(f"{len(assumed)} branches depend on data; counted as if the longer way were taken (--json).")


def _columns() -> int:
    return int(os.environ.get("COLUMNS", "0") or 0)


def _row(report: Report) -> tuple[str, ...]:
    case = report.case
    spills = f"{report.spills}" + (f" ({report.scratch_bytes} B)" if report.scratch_bytes else "")
    return (
        "/".join(map(str, case.shape.values())),
        "/".join(map(str, case.config.values())),
        str(report.vgprs),
        str(report.sgprs),
        spills,
        str(report.lds_bytes),
        f"{report.waves_per_simd:g}",
        f"{report.valu_per_weight:.2f}",
        f"{report.lane_inst_per_byte:.2f}",
        str(report.wmma),
        _weight_loads(report),
        f"{report.bound_bytes_per_second / 1e9:.0f}",
        f"{report.share_of_bandwidth:.0%}",
    )


def _weight_loads(report: Report) -> str:
    """Narrowest load of the largest tensor, which the weights are."""
    pointers = {name: one.size_bytes for launch in report.case.launches for name, one in launch.pointers.items()}
    largest = max(pointers, key=lambda name: pointers[name])
    bits = report.load_bits.get(largest, report.load_bits.get("?"))
    return "none" if bits is None else f"{largest.removesuffix('_ptr')} b{bits}"


def _mix(reports: Sequence[Report]) -> str:
    """Shares of all instructions, largest first."""
    total: dict[str, int] = {}
    for report in reports:
        for kind, times in report.mix.items():
            total[kind] = total.get(kind, 0) + times
    everything = sum(total.values())
    ranked = sorted(total.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {times / everything:.0%}" for kind, times in ranked if times * 200 > everything)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
