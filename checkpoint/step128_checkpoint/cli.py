"""``step128-checkpoint``: makes and changes checkpoints. Each command parses, calls one function, and prints."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from step128_checkpoint.commands import dequantize, inspect, quantize
from step128_checkpoint.commands.options import EXIT_CODES
from step128_checkpoint.errors import CheckpointError, ConfigurationError


@dataclass(frozen=True)
class _LateCommand:
    """A command whose module is imported only when it is asked for: what it needs takes seconds to load, or is not
    installed everywhere."""

    module: str
    help: str  # in the list of commands; the module's own --help describes it at length


_LATE_COMMANDS = {
    "tiny": _LateCommand(
        "step128_checkpoint.tiny.cli", "make and train a small Step-3.7 checkpoint that has everything the big one has"
    ),
    "download": _LateCommand("step128_checkpoint.download", "fetch a checkpoint from the hub, verified"),
    "samples": _LateCommand("step128_checkpoint.calibration.building.cli", "make a set of samples to calibrate with"),
    "calibrate": _LateCommand(
        "step128_checkpoint.calibration.cli", "measure experts, input channels and the KV cache in one sweep"
    ),
    "prune": _LateCommand("step128_checkpoint.pruning.cli", "drop the experts of each layer that matter least"),
    "perplexity": _LateCommand(
        "step128_checkpoint.evaluation.cli", "perplexity, and KL to another checkpoint, one layer in memory"
    ),
    "verify": _LateCommand("step128_checkpoint.verify", "read every byte: finite, in shape, as the manifest says"),
    "model-card": _LateCommand("step128_checkpoint.model_card", "write the product's README.md"),
    "chat": _LateCommand("step128_checkpoint.chat", "ask a checkpoint a question with transformers alone"),
}

_RESUMABLE = ("quantize", "dequantize", "prune", "calibrate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parsed = _parser(arguments).parse_args(arguments)
        return int(parsed.run(parsed))
    except CheckpointError as error:
        code, message = error.exit_code, str(error)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("step128"):
            raise
        code, message = ConfigurationError.exit_code, _missing(arguments[0], error)
    except PermissionError as error:
        code, message = 5, f"permission denied: {error.filename}"
    except KeyboardInterrupt:
        code, message = 130, _interrupted(next(iter(arguments), None))
    except Exception as error:
        traceback.print_exc()
        code, message = 1, f"internal error: {error!r}; please report it with the lines above"
    if "--json" in arguments:
        print(json.dumps({"error" if code else "message": message, "exit_code": code}))
    print(f"step128-checkpoint: {message}", file=sys.stderr)
    return code


def _interrupted(command: str | None) -> str:
    if command == "download":
        return "interrupted; run the same command again: finished files are kept"
    if command in _RESUMABLE:
        return "interrupted; run the same command again and it resumes"
    return "interrupted"


def _missing(command: str, error: ModuleNotFoundError) -> str:
    return f"`{command}` needs the package {error.name}. Install it: pip install 'step128[checkpoint]'"


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="step128-checkpoint",
        description="Make and change checkpoints. Every product is a normal Hugging Face folder.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands: Any = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, late in _LATE_COMMANDS.items():
        if name in arguments[:1]:
            import_module(late.module).add_parser(commands)
        else:
            commands.add_parser(name, help=late.help)
    for module in (quantize, dequantize, inspect):
        module.add_parser(commands)
    return parser
