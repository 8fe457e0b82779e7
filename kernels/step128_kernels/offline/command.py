"""``step128-kernels inspect``: what every shipped kernel costs, for people as tables and for programs as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from step128_kernels.command_options import check_kernels, positive
from step128_kernels.errors import KernelToolError, NoSuchKernelError
from step128_kernels.launch import KernelCase
from step128_kernels.offline.compile import require_triton
from step128_kernels.offline.cost import DEVICES
from step128_kernels.offline.inspect import Report, case_title, report_json
from step128_kernels.offline.parallel import inspect_cases
from step128_kernels.tuned.names import expanded

_SUMMARY = "compile every shipped kernel with no GPU and count what it costs"
_DESCRIPTION = f"""{_SUMMARY}.

Registers, spills, LDS and occupancy are the compiler's; instructions are counted over the whole call, loops by their
trip counts. Bandwidth bounds come from a cost model (kernels/README.md, "Cost model"): modelled, not measured."""


_OUR_WEIGHTS = "tiles_ptr"
_WIDE_COLUMNS = 160
"""What the whole table needs."""


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
    parser.add_argument("--kv-dtype", choices=["fp8", "bf16"], help="of attention, only this KV cache")
    parser.add_argument(
        "--q-len", type=positive, metavar="N", help="of attention, only calls with so many query tokens a sequence"
    )
    parser.add_argument("--phase", choices=["decode", "prefill"], help="default: both")
    parser.add_argument("--jobs", type=positive, metavar="N", help="processes (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Inspect what was asked for and print it."""
    cases = select_cases(parsed.arch, parsed.kernel, parsed.phase, parsed.kv_dtype, parsed.q_len)
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


def select_cases(
    arch: str | None, kernel: str | None, phase: str | None, kv_dtype: str | None = None, q_len: int | None = None
) -> list[KernelCase]:
    """Shipped cases that fit; the last two choose among attention's, and nothing else then.

    Raises:
        NoSuchKernelError: there is no such kernel, or nothing is shipped for that phase, dtype or length of it.
    """
    require_triton()
    from step128_kernels.attention.configs import KERNELS

    nl4, attention = (import_module(f"step128_kernels.{name}") for name in ("cases", "attention.cases"))
    wanted = None if kernel is None else expanded([kernel])
    if kv_dtype is not None or q_len is not None:
        wanted = [name for name in wanted or attention.SHAPES if name in attention.SHAPES]
        wanted = [name for name in wanted if kv_dtype is None or name == KERNELS[kv_dtype]]
    known = {**nl4.SHAPES, **attention.SHAPES}
    check_kernels(wanted or [], known)
    cases = [
        case
        for module in (nl4, attention)
        for name in module.SHAPES
        if wanted is None or name in wanted
        for case in module.all_cases(arch, name)
        if phase in (None, case.phase) and q_len in (None, case.shape.get("q_len"))
    ]
    if not cases:
        asked = f"{phase or 'any phase'}" + (f" with a KV cache of {kv_dtype}" if kv_dtype else "")
        asked += f" and {q_len} query tokens" if q_len else ""
        raise NoSuchKernelError(f"no configuration of {kernel or 'any kernel'} is for {asked}.")
    return cases


def _print_tables(reports: Sequence[Report]) -> None:
    console = Console(width=_columns())
    wide = console.width >= _WIDE_COLUMNS
    groups: dict[tuple[str, ...], list[Report]] = {}
    for report in reports:
        case = report.case
        names = "/".join(case.shape), "/".join(case.config)
        groups.setdefault((case.arch, case.kernel, case.phase, *names), []).append(report)
    for (arch, kernel, phase, shape, config), chosen in sorted(groups.items()):
        device = DEVICES[arch]
        mix = f"instructions: {_mix(chosen)}"
        table = Table(
            title=f"{kernel} {phase} on {arch} ({device.name}, {device.memory_bytes_per_second / 1e9:.0f} GB/s)",
            caption=f"config: {config}\n{mix}" if wide else mix,
            caption_justify="left",
        )
        unit = chosen[0].case.unit
        for heading in _wide_headings(shape, unit) if wide else _narrow_headings(shape, unit):
            table.add_column(heading, justify="left" if heading in (shape, "config") else "right", overflow="fold")
        for report in chosen:
            table.add_row(*(_wide_row(report) if wide else _narrow_row(report)))
        console.print(table)
    if not wide:
        console.print(f"For all figures and the configs: --json, or {_WIDE_COLUMNS} columns (it is {console.width}).")
    console.print(
        "* modelled, not measured: what instructions alone allow; expect 50-75 % of it. "
        "Above 100 % memory is the limit."
    )
    assumed = sorted({text for report in reports for one in report.launches for text in one.assumptions})
    if assumed:
        console.print(f"{len(assumed)} branches depend on data; counted as if the longer way were taken (--json).")


def _columns() -> int | None:
    """Width of the output: what $COLUMNS says, of a pipe without it enough for all; None lets the terminal say it."""
    said = os.environ.get("COLUMNS", "")
    if said.isascii() and said.isdecimal() and int(said) > 0:
        return int(said)
    return None if sys.stdout.isatty() else _WIDE_COLUMNS


def _narrow_headings(shape: str, unit: str) -> tuple[str, ...]:
    rows, _, rest = shape.partition("/")
    return rows, rest or "shape", "VGPR", "waves/SIMD", f"VALU/{unit}", "of card*"


def _narrow_row(report: Report) -> tuple[str, ...]:
    rows, *rest = map(str, report.case.shape.values())
    return (
        rows,
        "/".join(rest),
        str(report.vgprs),
        f"{report.waves_per_simd:g}",
        f"{report.valu_per_weight:.2f}",
        f"{report.share_of_bandwidth:.0%}",
    )


def _wide_headings(shape: str, unit: str) -> tuple[str, ...]:
    return (
        *(shape, "config", "VGPR", "SGPR", "spills", "LDS", "waves/SIMD", f"VALU/{unit}", "inst/B", "WMMA"),
        *("groups", f"{unit} loads", "bound GB/s*", "of card*"),
    )


def _wide_row(report: Report) -> tuple[str, ...]:
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
        str(report.workgroups),
        _weight_loads(report),
        f"{report.bound_bytes_per_second / 1e9:.0f}",
        f"{report.share_of_bandwidth:.0%}",
    )


def _weight_loads(report: Report) -> str:
    """Narrowest load of the weights: of ours their tiles, else the largest tensor; of attention that of the pages."""
    if report.case.unit != "weight":
        return f"KV b{min(report.load_bits.get('?', 0), report.load_bits.get('cache_ptr', 1 << 20))}"
    pointers = {name: one.size_bytes for launch in report.case.launches for name, one in launch.pointers.items()}
    weights = _OUR_WEIGHTS if _OUR_WEIGHTS in pointers else max(pointers, key=lambda name: pointers[name])
    bits = report.load_bits.get(weights)
    return f"{weights.removesuffix('_ptr')} {'unknown' if bits is None else f'b{bits}'}"


def _mix(reports: Sequence[Report]) -> str:
    """Shares of all instructions, largest first."""
    total: dict[str, int] = {}
    for report in reports:
        for kind, times in report.mix.items():
            total[kind] = total.get(kind, 0) + times
    everything = sum(total.values())
    ranked = sorted(total.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {times / everything:.0%}" for kind, times in ranked if times * 200 > everything)
