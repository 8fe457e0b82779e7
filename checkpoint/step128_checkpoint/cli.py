"""``step128-checkpoint``: makes and changes checkpoints. Each command parses, calls one function, and prints."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from step128_checkpoint.conversion import DEFAULT_MAX_SHARD_BYTES, Conversion, convert
from step128_checkpoint.dequantize import plan_dequantization
from step128_checkpoint.errors import CheckpointError, ConfigurationError
from step128_checkpoint.files import size_text
from step128_checkpoint.header import TensorInfo
from step128_checkpoint.inspect import ComponentSize, component_sizes, inspect_checkpoint
from step128_checkpoint.places import check_places
from step128_checkpoint.policy import Policy, load_policy
from step128_checkpoint.quantize import open_importance, plan_quantization
from step128_checkpoint.reader import Checkpoint, open_checkpoint
from step128_checkpoint.shards import disk_error
from step128_checkpoint.tables import before_and_after, print_inspection

EXIT_CODES = """exit codes:
  0 done    1 internal error    2 wrong usage    5 permission denied
  65 bad checkpoint or data (`inspect`: there are problems)
  66 input not found    73 output cannot be written (exists, overlaps the input, disk full)
  78 unknown policy, bad policy file or missing package
  130 interrupted by Ctrl-C (`quantize` and `dequantize` resume when the same command is run again)"""

_TINY_HELP = "make and train a small Step-3.7 checkpoint that has everything the big one has"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parsed = _parser(arguments).parse_args(arguments)
        return int(parsed.run(parsed))
    except CheckpointError as error:
        code, message = error.exit_code, str(error)
    except PermissionError as error:
        code, message = 5, f"permission denied: {error.filename}"
    except KeyboardInterrupt:
        resumes = arguments[:1] in (["quantize"], ["dequantize"])
        code, message = 130, "interrupted" + "; run the same command again and it resumes" * resumes
    except Exception as error:
        traceback.print_exc()
        code, message = 1, f"internal error: {error!r}; please report it with the lines above"
    if "--json" in arguments:
        print(json.dumps({"error": message, "exit_code": code}))
    print(f"step128-checkpoint: {message}", file=sys.stderr)
    return code


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="step128-checkpoint",
        description="Make and change checkpoints. Every product is a normal Hugging Face folder.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_quantize(commands)
    _add_dequantize(commands)
    _add_inspect(commands)
    if "tiny" in arguments[:1]:
        # Imported only when asked for: it needs torch, which takes seconds to load and may not be installed.
        try:
            from step128_checkpoint.tiny.cli import add_parser
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"`tiny` needs the package {error.name}. Install it: pip install 'step128[checkpoint]'"
            ) from error
        add_parser(commands)
    else:
        commands.add_parser("tiny", help=_TINY_HELP)
    return parser


def _add_quantize(commands: Any) -> None:
    parser = _command(commands, "quantize", _quantize, "quantize a bf16, fp16 or fp32 checkpoint to NL4")
    parser.add_argument("--policy", help="what to quantize; the names are in configs/quantization/nl4.yaml")
    parser.add_argument(
        "--scale-search", choices=["mse", "absmax"], default="mse", help="how scales are chosen (default: %(default)s)"
    )
    parser.add_argument(
        "--importance", type=Path, metavar="FILE", help="safetensors: weight of each input channel, [K] or [E, K]"
    )
    _add_conversion_options(parser)


def _add_dequantize(commands: Any) -> None:
    parser = _command(commands, "dequantize", _dequantize, "turn an NL4 checkpoint back into plain weights")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="default: %(default)s (exact)"
    )
    _add_conversion_options(parser)


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="say what a checkpoint holds, by component")
    parser.add_argument("input", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_inspect)


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path, metavar="IN", help="checkpoint folder")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make")
    parser.set_defaults(run=run)
    return parser


def _add_conversion_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-shard-bytes", type=_count, default=DEFAULT_MAX_SHARD_BYTES, metavar="N")
    parser.add_argument(
        "--jobs", type=_count, default=os.cpu_count() or 1, metavar="N", help="threads (default: all cores)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and the sizes")
    parser.add_argument("--restart", action="store_true", help="start over instead of continuing an interrupted run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _quantize(arguments: argparse.Namespace) -> int:
    policy = load_policy(arguments.policy)
    checkpoint = open_checkpoint(arguments.input)
    importance = open_importance(arguments.importance, checkpoint) if arguments.importance else None
    conversion = plan_quantization(
        checkpoint, policy, arguments.scale_search, importance, max_shard_bytes=arguments.max_shard_bytes
    )
    return _convert(arguments, conversion, policy)


def _dequantize(arguments: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(arguments.input)
    conversion = plan_dequantization(checkpoint, arguments.dtype, max_shard_bytes=arguments.max_shard_bytes)
    return _convert(arguments, conversion, load_policy())


def _convert(arguments: argparse.Namespace, conversion: Conversion, policy: Policy) -> int:
    try:
        check_places(arguments.input, arguments.output)
    except OSError as error:
        raise disk_error(arguments.output, error) from error
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
    else:
        report |= _run(arguments, conversion)
        console.print(
            f"{escape(str(arguments.output))}: {size_text(output_bytes)} in {report['seconds']:.1f} s, "
            f"{report['converted_weights_per_second'] / 1e6:.2f} M weights/s"
        )
        if report["verified_tensors"] or report["redone_tensors"]:
            console.print(
                f"From the interrupted run: {report['verified_tensors']} tensors verified and kept, "
                f"{report['redone_tensors']} damaged and made again"
            )
    if arguments.json:
        print(json.dumps(report))
    return 0


def _run(arguments: argparse.Namespace, conversion: Conversion) -> dict[str, Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    stderr = Console(stderr=True)
    started = time.monotonic()
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("writing", total=sum(step.size_bytes for step in conversion.steps))
        summary = convert(
            conversion, arguments.output, arguments.jobs, arguments.restart, lambda done: progress.advance(task, done)
        )
    seconds = time.monotonic() - started
    names = {output.name for step in conversion.steps for output in step.outputs}
    converted = sum(t.elements for t in conversion.checkpoint.tensors.values() if t.name not in names)
    return {
        "seconds": seconds,
        "converted_weights_per_second": converted / seconds,
        **asdict(summary.write),
    }


def _sizes_after(conversion: Conversion, policy: Policy) -> tuple[ComponentSize, ...]:
    """Component sizes of the planned output, as if it existed."""
    outputs = [output for step in conversion.steps for output in step.outputs]
    tensors = {o.name: TensorInfo(o.name, o.dtype, o.shape, Path(o.file_name), 0) for o in outputs}
    return component_sizes(Checkpoint(conversion.checkpoint.folder, conversion.config, tensors), policy)


def _inspect(arguments: argparse.Namespace) -> int:
    found = inspect_checkpoint(open_checkpoint(arguments.input), load_policy())
    if arguments.json:
        rows = [asdict(row) | {"bits_per_weight": row.bits_per_weight} for row in (*found.components, found.total)]
        print(json.dumps(asdict(found) | {"folder": str(found.folder), "components": rows}))
    else:
        print_inspection(found)
    return CheckpointError.exit_code if found.problems else 0
