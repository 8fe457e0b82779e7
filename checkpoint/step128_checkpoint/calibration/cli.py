"""``step128-checkpoint calibrate``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from step128_checkpoint.calibration.needs import Needs, check_disk, check_memory, needs_of
from step128_checkpoint.calibration.options import (
    DEFAULT_BATCH_TOKENS,
    DEFAULT_PILOT_SAMPLES,
    DTYPE_NAMES,
    CalibrationOptions,
)
from step128_checkpoint.calibration.plan import Plan, make_plan
from step128_checkpoint.calibration.result_writer import device_name
from step128_checkpoint.calibration.sweep import calibrate
from step128_checkpoint.commands.options import add_command, non_negative, positive
from step128_checkpoint.files import size_text
from step128_checkpoint.memory import memory_size
from step128_checkpoint.places import check_places, work_folder
from step128_checkpoint.pruning.criteria import Criterion

_DESCRIPTION = """Run samples through a checkpoint, one layer in memory at a time, and measure on the way which experts
matter (REAP), which input channels matter (for quantize), and how large K and V get (for FP8 KV scales). With --prune
each layer is pruned before its inputs and its K and V are measured, so that they are the pruned model's. Resumes when
the same command is run again. Of an NL4 checkpoint it measures the quantized model: its ranges of K and V, to read in
CAL/calibration.json. prune and quantize start from the plain checkpoint and need the calibration of that."""


def add_parser(commands: Any) -> None:
    """Register the command with argparse's subparsers object."""
    parser = add_command(commands, "calibrate", _run, "measure experts, input channels and the KV cache in one sweep")
    parser.description = _DESCRIPTION
    parser.add_argument("input", type=Path, metavar="IN", help="checkpoint folder, bf16 or NL4")
    parser.add_argument("output", type=Path, metavar="CAL", help="calibration folder to make")
    parser.add_argument("--samples-from", type=Path, required=True, metavar="SAMPLES", help="folder made by `samples`")
    pruning = parser.add_argument_group("pruning")
    pruning.add_argument(
        "--prune", type=positive, metavar="KEEP", help="experts to keep in each layer (default: all); not with NL4"
    )
    pruning.add_argument(
        "--criterion", choices=get_args(Criterion), default="reap", help="how experts rank (default: %(default)s)"
    )
    pruning.add_argument("--seed", type=non_negative, default=0, help="of the criterion random (default: %(default)s)")
    pruning.add_argument(
        "--pilot-samples",
        type=positive,
        default=DEFAULT_PILOT_SAMPLES,
        metavar="N",
        help="samples that find the super-experts, which always stay, before pruning (default: %(default)s)",
    )
    parser.add_argument(
        "--hessians", action="store_true", help="also keep the inputs' second-moment matrices, for --method gptq"
    )
    running = parser.add_argument_group("running")
    running.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: a GPU if there is one)")
    running.add_argument(
        "--dtype", choices=DTYPE_NAMES, default="auto", help="of the computation (default: as the checkpoint)"
    )
    running.add_argument(
        "--batch-tokens",
        type=positive,
        default=DEFAULT_BATCH_TOKENS,
        metavar="N",
        help="tokens that go through a layer at once (default: %(default)s)",
    )
    running.add_argument(
        "--max-memory",
        type=memory_size,
        metavar="SIZE",
        help="for a layer and a batch, on the device that computes (default: what is free there)",
    )
    running.add_argument("--dry-run", action="store_true", help="print what would be done and what it needs")
    running.add_argument("--restart", action="store_true", help="start over instead of continuing an interrupted run")
    running.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    options = CalibrationOptions(
        checkpoint=arguments.input,
        samples=arguments.samples_from,
        out=arguments.output,
        keep=arguments.prune,
        criterion=arguments.criterion,
        seed=arguments.seed,
        hessians=arguments.hessians,
        device=arguments.device,
        dtype=arguments.dtype,
        batch_tokens=arguments.batch_tokens,
        pilot_samples=arguments.pilot_samples,
        max_memory_bytes=arguments.max_memory,
        restart=arguments.restart,
    )
    console = Console(stderr=arguments.json)
    plan = make_plan(options)
    needs = needs_of(plan)
    console.print(_table(plan, needs))
    report: dict[str, Any] = {
        "output": str(options.out),
        **{key: value for key, value in plan.fingerprint().items() if key != "input"},
        "device": str(plan.device),
        "batch_tokens": options.batch_tokens,
        "stages": len(plan.stages),
        "tokens": plan.total_tokens,
        "needs_bytes": asdict(needs) | {"memory": needs.memory},
    }
    if arguments.dry_run:
        check_places(options.checkpoint, options.out)
        check_disk(plan, needs, work_folder(options.out))
        check_memory(plan, needs)
        console.print(f"Nothing was written. Would make {escape(str(options.out))}.")
    else:
        report |= calibrate_with_progress(options, console)
    if arguments.json:
        print(json.dumps(report))
    return 0


def calibrate_with_progress(options: CalibrationOptions, console: Console) -> dict[str, Any]:
    """Calibrate with a progress bar on stderr (if it is a terminal), print what was done, and return it as JSON values.

    Raises:
        CheckpointError: and its kinds, from :func:`calibrate`.
    """
    stderr = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), _TokensPerSecond(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("reading", total=None)
        summary = calibrate(
            options, lambda name, done, total: progress.update(task, description=name, completed=done, total=total)
        )
    console.print(
        f"{escape(str(options.out))}: {summary.tokens} tokens through a layer in {summary.seconds:.1f} s, "
        f"{summary.tokens / summary.seconds:.0f} a second"
    )
    if summary.damaged:
        console.print(f"The interrupted run's {summary.damaged} was damaged; everything was done again")
    elif summary.verified_stages:
        console.print(
            f"From the interrupted run: {summary.verified_stages} of {summary.stages} stages verified and kept"
        )
    for warning in summary.warnings:
        console.print(f"Warning: {warning}")
    return asdict(summary)


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Speed of the last seconds."""
        return Text(f"{task.speed:.0f} tokens/s" if task.speed else "")


def _table(plan: Plan, needs: Needs) -> Table:
    counted = [batch for batch in plan.batches if not batch.held_out]
    tokens = sum(batch.tokens for batch in counted)
    keep = plan.options.keep
    rows = {
        "model": f"{plan.dimensions.num_hidden_layers} layers and {len(plan.mtp_layers)} MTP layers, "
        f"{str(plan.dtype).removeprefix('torch.')} on {device_name(plan.device)}",
        "samples": f"{sum(len(batch.numbers) for batch in counted)} of {tokens} tokens, and "
        f"{sum(len(batch.numbers) for batch in plan.batches) - sum(len(batch.numbers) for batch in counted)} held out",
        "experts": "all are kept"
        if keep is None
        else f"{keep} of {plan.dimensions.num_experts} are kept by {plan.options.criterion}, and super-experts, "
        f"which {sum(len(batch.numbers) for batch in plan.pilot_batches)} samples find",
        "work": f"{plan.total_tokens} tokens through a layer, in {len(plan.stages)} stages",
        "disk": f"{size_text(needs.disk)}, of which {size_text(needs.results)} stay",
        "memory": f"{size_text(needs.memory)}: {size_text(needs.layer)} for the largest layer and its statistics, "
        f"{size_text(needs.batch)} for {plan.options.batch_tokens} tokens at once",
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
