"""``step128-eval``: checks a server over HTTP. Each command parses, runs one function, and prints."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from step128_evals.errors import ConfigurationError, EvalError
from step128_evals.options import EXIT_CODES, Report

COMMANDS = {
    "probe": "step128_evals.probe_command",
    "smoke": "step128_evals.smoke_command",
    "ppl": "step128_evals.perplexity.command",
    "needle": "step128_evals.needle.command",
    "tools": "step128_evals.tools.command",
    "acceptance": "step128_evals.acceptance.command",
    "mtp-depth": "step128_evals.acceptance.advice_command",
    "depth": "step128_evals.depth.command",
    "soak": "step128_evals.soak.command",
    "vision": "step128_evals.vision.command",
    "reasoning": "step128_evals.reasoning.command",
    "show": "step128_evals.report.show_command",
    "report": "step128_evals.report.command",
    "compare": "step128_evals.compare.command",
    "gate": "step128_evals.gate.command",
}
"""Each module has ``add_parser(commands)``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        code = _main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough (`| head`). What Python still holds back for it goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _main(arguments: Sequence[str] | None) -> int:
    parsed = _parser(list(sys.argv[1:] if arguments is None else arguments)).parse_args(arguments)
    report: Report
    code: int
    try:
        report, code = parsed.run(parsed)
    except EvalError as error:
        report, code = {"error": str(error)}, error.exit_code
    except ExceptionGroup as group:
        known = [error for error in group.exceptions if isinstance(error, EvalError)]
        report, code = ({"error": str(known[0])}, known[0].exit_code) if known else _internal(group)
    except ModuleNotFoundError as error:
        report, code = _missing(error)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        report, code = {"error": "interrupted; what was finished is kept"}, 130
    except Exception as error:
        report, code = _internal(error)
    if parsed.json:
        print(json.dumps(report | {"exit_code": code}))
    if "error" in report:
        print(f"step128-eval: {report['error']}", file=sys.stderr)
    return code


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="step128-eval",
        description="Measure a server that speaks the OpenAI API, so that two people, or two versions, can compare.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    # The modules of the other commands would only cost time: some load scipy or matplotlib.
    named = [name for name in arguments[:1] if name in COMMANDS]
    for name in named or COMMANDS:
        importlib.import_module(COMMANDS[name]).add_parser(commands)
    return parser


def _missing(error: ModuleNotFoundError) -> tuple[Report, int]:
    if str(error.name).startswith("step128"):
        return _internal(error)
    extra = "checkpoint" if error.name in ("torch", "transformers") else "evals"
    remedy = f"pip install 'step128[{extra}]'"
    return {"error": f"the Python package {error.name} is not installed: {remedy}"}, ConfigurationError.exit_code


def _internal(error: Exception) -> tuple[Report, int]:
    traceback.print_exception(error)
    return {"error": f"internal error: {error!r}; please report it with the lines above"}, 1
