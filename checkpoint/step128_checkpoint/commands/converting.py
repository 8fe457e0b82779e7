"""Runs a conversion for a command: sizes before and after, a progress bar, and what came of it."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape

from step128_checkpoint.byte_progress import byte_progress
from step128_checkpoint.conversion import Conversion, ConversionSummary, check_disk, convert
from step128_checkpoint.files import size_text
from step128_checkpoint.header import TensorInfo
from step128_checkpoint.inspect import ComponentSize, component_sizes
from step128_checkpoint.places import check_places, work_folder
from step128_checkpoint.policy import Policy
from step128_checkpoint.reader import Checkpoint
from step128_checkpoint.shards import disk_error, memory_room
from step128_checkpoint.tables import before_and_after


def check_output(source: Path, out: Path) -> None:
    """Refuse a place that cannot be written before any work is done for it."""
    try:
        check_places(source, out)
    except OSError as error:
        raise disk_error(out, error) from error


def check_room(conversion: Conversion, out: Path, max_memory_bytes: int) -> None:
    """Refuse too little disk or memory for a conversion before other long work is done for it.

    Raises:
        OutputError, ConfigurationError: see :func:`convert`.
    """
    check_disk(conversion.layout(), 0, work_folder(out.absolute()) / "checkpoint")
    memory_room(conversion.steps, max_memory_bytes)


def run_conversion(
    arguments: argparse.Namespace, conversion: Conversion, policy: Policy
) -> tuple[dict[str, Any], ConversionSummary | None]:
    """Convert and say so, or only say what would be done; returns the report for ``--json``, and what was done."""
    check_output(arguments.input, arguments.output)
    before, after = component_sizes(conversion.checkpoint, policy), _sizes_after(conversion, policy)
    output_bytes = sum(row.size_bytes for row in after)
    report: dict[str, Any] = {
        "output": str(arguments.output),
        **conversion.options,
        "input_bytes": sum(row.size_bytes for row in before),
        "output_bytes": output_bytes,
        "components": [asdict(row) | {"bits_per_weight": row.bits_per_weight} for row in after],
    }
    console = Console(stderr=arguments.json)
    console.print(before_and_after(before, after))
    if arguments.dry_run:
        console.print(
            f"Nothing was written. Would write {len(conversion.layout().headers)} files, {size_text(output_bytes)}, to "
            f"{escape(str(arguments.output))}."
        )
        return report, None
    started = time.monotonic()
    summary = _convert(arguments, conversion)
    seconds = time.monotonic() - started
    names = {output.name for step in conversion.steps for output in step.outputs}
    converted = sum(t.elements for t in conversion.checkpoint.tensors.values() if t.name not in names)
    report |= {
        "seconds": seconds,
        "converted_weights_per_second": converted / seconds,
        **asdict(summary.write),
    }
    speed = f"{converted / seconds / 1e6:.2f} M weights/s" if converted else f"{size_text(output_bytes / seconds)}/s"
    console.print(f"{escape(str(arguments.output))}: {size_text(output_bytes)} in {seconds:.1f} s, {speed}")
    if summary.write.verified_tensors or summary.write.redone_tensors:
        console.print(
            f"From the interrupted run: {summary.write.verified_tensors} tensors verified and kept, "
            f"{summary.write.redone_tensors} damaged and made again"
        )
    return report, summary


def finish(arguments: argparse.Namespace, report: dict[str, Any], *renderables: RenderableType) -> int:
    """Print what a command adds for people, and the JSON object for programs; returns exit code 0."""
    console = Console(stderr=arguments.json)
    for renderable in renderables:
        console.print(renderable)
    if arguments.json:
        print(json.dumps(report))
    return 0


def _convert(arguments: argparse.Namespace, conversion: Conversion) -> ConversionSummary:
    with byte_progress("writing", sum(step.size_bytes for step in conversion.steps)) as advance:
        return convert(conversion, arguments.output, arguments.jobs, arguments.restart, advance, arguments.max_memory)


def _sizes_after(conversion: Conversion, policy: Policy) -> tuple[ComponentSize, ...]:
    """Component sizes of the planned output, as if it existed."""
    outputs = [output for step in conversion.steps for output in step.outputs]
    tensors = {o.name: TensorInfo(o.name, o.dtype, o.shape, Path(o.file_name), 0) for o in outputs}
    return component_sizes(Checkpoint(conversion.checkpoint.folder, conversion.config, tensors), policy)
