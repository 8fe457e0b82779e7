"""The command line of `step128`."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from step128_launcher.errors import EXIT_CODE_HELP, ExitCode
from step128_launcher.profiles import DTYPES, parse_size

DEFAULT_PORT = 8000
DEFAULT_METRICS_PORT = 9128


def parse(
    commands: Mapping[str, Callable[[argparse.Namespace], ExitCode]], arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Return the options; a usage error ends the process with status 2, as argparse does."""
    parser = _build_parser(commands)
    options = parser.parse_args(arguments)
    if getattr(options, "metrics_port", 0) == getattr(options, "port", None):
        parser.error(f"--port and --metrics-port are both {options.port}; they must differ")
    return options


def _build_parser(commands: Mapping[str, Callable[[argparse.Namespace], ExitCode]]) -> argparse.ArgumentParser:
    """Return the parser; `commands` is command name -> what runs it, left in the namespace as `run`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="step128",
        description="Plan a server for one checkpoint on this machine, start and watch it.",
        epilog=EXIT_CODE_HELP,
        formatter_class=raw,
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    plan = subparsers.add_parser(
        "plan",
        help="decide the settings for a checkpoint on this machine, and say why",
        epilog=EXIT_CODE_HELP,
        formatter_class=raw,
    )
    _add_plan_options(plan)
    plan.add_argument("--json", action="store_true", help="print the plan as one JSON document (schema: plan_json.py)")
    plan.set_defaults(run=commands["plan"])

    serve = subparsers.add_parser(
        "serve", help="plan, start vLLM, verify it, watch it", epilog=EXIT_CODE_HELP, formatter_class=raw
    )
    _add_plan_options(serve)
    serve.add_argument(
        "--metrics-port",
        type=_metrics_port,
        default=DEFAULT_METRICS_PORT,
        help="port of the plan's Prometheus metrics on 127.0.0.1; 0 for none (default: %(default)s)",
    )
    serve.add_argument(
        "--api-key-file",
        type=Path,
        help="file holding the API key; else STEP128_API_KEY, VLLM_API_KEY, or one generated into the state folder",
    )
    serve.add_argument("--dry-run", action="store_true", help="print environment and argv, start nothing")
    serve.set_defaults(run=commands["serve"])

    profiles = subparsers.add_parser("profiles", help="list the hardware profiles")
    profiles.add_argument("--json", action="store_true", help="print them as one JSON document")
    profiles.set_defaults(run=commands["profiles"])
    return parser


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint folder")
    parser.add_argument("--profile", default="auto", help="hardware profile; auto chooses by the machine")
    parser.add_argument("--max-model-len", type=_positive, help="context length in tokens")
    parser.add_argument("--num-speculative-tokens", type=int, choices=range(4), help="MTP depth")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), help="fp8 needs calibrated scales")
    parser.add_argument("--max-num-seqs", type=_positive, help="requests decoded at once")
    parser.add_argument("--max-num-batched-tokens", type=_positive, help="tokens of one scheduler step")
    parser.add_argument("--tensor-parallel-size", type=_positive, help="ranks the weights are cut into")
    parser.add_argument("--dtype", choices=DTYPES, help="of activations and unquantized weights")
    parser.add_argument("--block-size", type=_positive, help="tokens of a KV-cache block, a multiple of 32")
    parser.add_argument(
        "--enforce-eager", action=argparse.BooleanOptionalAction, default=None, help="without torch.compile"
    )
    parser.add_argument("--memory", type=_size, help="budget instead of the profile's share, such as 6GiB")
    parser.add_argument("--served-model-name", help="model name in the API (default: the folder's name)")
    parser.add_argument("--host", type=_host, default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=DEFAULT_PORT, help="port of the API (default: %(default)s)")
    parser.add_argument(
        "--state-dir", type=Path, help="folder for log, key and status (default: ~/.local/state/step128/PORT)"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError("must be from 1 to 65535")
    return value


def _metrics_port(text: str) -> int:
    return 0 if text == "0" else _port(text)


def _host(text: str) -> str:
    host = text.strip().removeprefix("[").removesuffix("]")
    if not host:
        raise argparse.ArgumentTypeError("must be an address or a name; 0.0.0.0 listens on every address")
    return host


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be {error}") from error
    if not size:
        raise argparse.ArgumentTypeError("must be above zero")
    return size
