"""``step128-kernels``: inspects, tunes and measures our GPU kernels. Each command is a module of its own."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence

from step128_kernels.bench import command as bench_command
from step128_kernels.errors import KernelToolError
from step128_kernels.offline import command as inspect_command
from step128_kernels.tune import command as tune_command

EXIT_CODES = """exit codes:
  0 done    1 internal error    2 wrong usage    5 permission denied
  3 not enough GPU memory to measure    4 no GPU to measure on, or one that nothing is tuned for
  66 no such kernel    69 the GPU failed
  70 a kernel does not compile, cannot be counted, has no configuration that may serve, or gives wrong results
     (the others are still done)
  73 the output cannot be written, or another run is writing it
  78 a package is missing, an environment variable is in the way, or a file of tuned configurations is unusable
  130 interrupted by Ctrl-C"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except KernelToolError as error:
        code, message = error.exit_code, str(error)
    except PermissionError as error:
        code, message = 5, f"permission denied: {error.filename}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except Exception as error:
        traceback.print_exc()
        code, message = 1, f"internal error: {error!r}; please report it with the lines above"
    print(f"step128-kernels: {message}", file=sys.stderr, flush=True)
    if parsed.json or getattr(parsed, "ends_with_json", False):
        print(json.dumps({"error": message, "exit_code": code}), flush=True)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="step128-kernels",
        description="Inspect, tune and measure the GPU kernels of step128.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect_command.add_parser(commands, EXIT_CODES)
    tune_command.add_parser(commands, EXIT_CODES)
    bench_command.add_parser(commands, EXIT_CODES)
    return parser


if __name__ == "__main__":
    sys.exit(main())
