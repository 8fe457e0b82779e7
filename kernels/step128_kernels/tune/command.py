"""``step128-kernels tune``: find the fastest configuration of each kernel and shape, and write `configs/tuned/*.json`.

On a GPU of a supported kind every candidate is measured; without one they are ranked by the offline cost model, and the
files say so. An interrupted run goes on where it stopped: every finished candidate is in a journal beside the output.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from step128_kernels.command_options import positive
from step128_kernels.tune.files import Provenance, tune
from step128_kernels.tune.journal import Outcome
from step128_kernels.tune.options import Plan, output_folder, parsed_shape, plan
from step128_kernels.tune.search import Candidate, Judge
from step128_kernels.tuned.names import SUPPORTED_ARCHS
from step128_kernels.tuned.schema import MEASURED, MODELLED

_NOTHING_SERVES = 70
_SUMMARY = "find the fastest configuration of every kernel and shape, and write it to files"
_DESCRIPTION = f"""{_SUMMARY}.

On a GPU of a supported kind every candidate is measured. Without one, candidates are ranked by the cost model of
`inspect`, and the files say "modelled, not measured"; they never replace measured ones. An interrupted run goes on
where it stopped when the same command is given again."""


def add_parser(commands: Any, epilog: str) -> None:
    """Add `tune` to the commands of ``step128-kernels``."""
    parser = commands.add_parser(
        "tune",
        help=_SUMMARY,
        description=_DESCRIPTION,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", action="append", metavar="NAME", help="tune this kernel; default: all")
    parser.add_argument(
        "--attention", action="store_true", help="tune attention: --kernel attention_fp8, attention_bf16"
    )
    parser.add_argument(
        "--shape", action="append", type=parsed_shape, metavar="N=…,K=…", help="tune this shape; default: all we ship"
    )
    parser.add_argument(
        "--arch",
        choices=SUPPORTED_ARCHS,
        help="tune for this architecture; unless it is this machine's GPU, by the cost model. Default: this machine's "
        "GPU, or without one, all by the cost model",
    )
    parser.add_argument("--device-name", metavar="NAME", help="GPU's name in the file, for the cost model with --arch")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: $STEP128_TUNED_DIR, else the folder of the shipped files"
    )
    parser.add_argument("--restart", action="store_true", help="forget what an interrupted run has finished")
    parser.add_argument(
        "--jobs", type=positive, metavar="N", help="compiling processes of the cost model; default: all cores"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Tune as the command line says; returns the exit code.

    Raises:
        KernelToolError: if it cannot be done.

    """
    from step128_kernels.offline.compile import require_triton

    require_triton()
    from step128_kernels.gpu import this_gpu
    from step128_kernels.tune.spaces import shipped_shapes, space_of

    what = plan(options, shipped_shapes(), this_gpu())
    output = output_folder(options.output)
    console = Console(stderr=True)
    console.print(_intention(what, output))
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    with bar, _judging(what, options.jobs or os.cpu_count() or 1) as judge:
        result = tune(what.targets, space_of, judge, _provenance(what), output, options.restart, bar)
    if options.json:
        print(json.dumps({"schema": 1, "source": _source(what), **asdict(result)}))
    for verb, paths in (("wrote", result.written), ("kept, as it was measured:", result.kept)):
        for path in paths:
            print(f"{verb} {path}", file=sys.stderr if options.json else sys.stdout)
    for warning in result.warned:
        print(f"step128-kernels: warning: {warning}", file=sys.stderr)
    for problem in result.failed:
        print(f"step128-kernels: {problem}", file=sys.stderr)
    return _NOTHING_SERVES if result.failed else 0


def _source(what: Plan) -> str:
    return MODELLED if what.gpu is None else MEASURED


def _intention(what: Plan, output: Path) -> str:
    how = "ranking by the cost model, nothing is measured" if what.gpu is None else f"measuring on {what.gpu.name}"
    count = len(what.targets)
    return f"{count} {'file' if count == 1 else 'files'} for {output}: {how}"


def _judging(what: Plan, jobs: int) -> AbstractContextManager[Judge]:
    if what.gpu is None:
        from step128_kernels.tune.model import model_one, modelling

        return modelling(model_one, jobs)
    return nullcontext(_measure)


def _measure(candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Outcome]]:
    import torch

    from step128_kernels.tune.measure import measure_all, median_seconds
    from step128_kernels.tune.spaces import space_of

    if not candidates:
        return iter(())
    return measure_all(space_of(candidates[0].target.kernel), candidates, median_seconds, torch.cuda.synchronize)


def _provenance(what: Plan) -> Provenance:
    from step128_kernels.gpu import code_digest, versions
    from step128_kernels.tune.measure import METHOD as MEASURING
    from step128_kernels.tune.model import METHOD as MODELLING

    return Provenance(
        source=_source(what),
        method=MODELLING if what.gpu is None else MEASURING,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        driver=None if what.gpu is None else what.gpu.driver,
        code=code_digest(),
    )
