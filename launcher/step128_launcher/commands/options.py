"""The command line of `step128`."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from step128_launcher.access import AccessLimits
from step128_launcher.commands.stack_options import add_project, add_stack_commands
from step128_launcher.errors import EXIT_CODE_HELP, ExitCode
from step128_launcher.planning.plan import OBJECTIVES
from step128_launcher.planning.profile_checks import parse_size
from step128_launcher.planning.profile_schema import DTYPES
from step128_launcher.sizes import format_bytes

DEFAULT_PORT = 8000
DEFAULT_METRICS_PORT = 9128


def parse(
    commands: Mapping[str, Callable[[argparse.Namespace], ExitCode]], arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Return the options; a usage error ends the process with status 2, as argparse does."""
    parser = _build_parser(commands)
    options = parser.parse_args(arguments)
    if "model_option" in options:
        if (options.model is None) == (options.model_option is None):
            parser.error("give MODEL once: as an argument or with --model")
        options.model = options.model or options.model_option
    if getattr(options, "candidates", False) and not options.json:
        parser.error("--candidates needs --json")
    if getattr(options, "metrics_port", 0) == getattr(options, "port", None):
        parser.error(f"--port and --metrics-port are both {options.port}; they must differ")
    return options


def _build_parser(commands: Mapping[str, Callable[[argparse.Namespace], ExitCode]]) -> argparse.ArgumentParser:
    """Return the parser; `commands` is command name -> what runs it, left in the namespace as `run`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="step128",
        description="Plan a server for one checkpoint on this machine, start and watch it; by hand or in containers.",
        epilog=EXIT_CODE_HELP,
        formatter_class=raw,
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=summary, epilog=EXIT_CODE_HELP, formatter_class=raw)
        command.set_defaults(run=commands[name])
        return command

    plan = add("plan", "decide the settings for a checkpoint on this machine, and say why")
    _add_plan_options(plan)
    plan.add_argument(
        "--policy",
        help="plan as if quantized by this policy; of MODEL only config.json is read, so plan before you do",
    )
    _add_machine(plan)
    shown = plan.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print the plan as one JSON document (schema: plan_json.py)")
    shown.add_argument("--dry-run", action="store_true", help="print the exact vLLM argv and environment")
    shown.add_argument("--explain", metavar="ITEM", help="explain one item of the plan (a memory line or a setting)")
    plan.add_argument("--candidates", action="store_true", help="with --json: list every candidate with its verdict")

    serve = add("serve", "plan, start vLLM, verify it, watch it")
    _add_plan_options(serve)
    serve.add_argument(
        "--metrics-port",
        type=_metrics_port,
        default=DEFAULT_METRICS_PORT,
        help="port of the plan's Prometheus metrics and of /health; 0 for none (default: %(default)s)",
    )
    serve.add_argument("--metrics-host", type=_host, default="127.0.0.1", help="its address (default: %(default)s)")
    serve.add_argument(
        "--api-key-file",
        type=Path,
        help="file holding the API key; else STEP128_API_KEY, VLLM_API_KEY, or one generated into the state folder",
    )
    serve.add_argument(
        "--metrics-token-file",
        type=Path,
        help="file holding a key that opens vLLM's /metrics and nothing else; else STEP128_METRICS_TOKEN, or none: "
        "/metrics takes the API key only",
    )
    serve.add_argument("--dry-run", action="store_true", help="print environment and argv, start nothing")
    serve.add_argument(
        "--measure",
        action="store_true",
        help="let vLLM size the KV cache once, so that `step128 calibrate` can read what the rest takes (GPU)",
    )
    serve.add_argument(
        "--service",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="stay up, unhealthy, where a restart cannot help (default: STEP128_SERVICE=1 in the environment)",
    )
    serve.add_argument(
        "--max-restarts", type=int, default=5, help="without 10 minutes of health between (default: %(default)s)"
    )
    serve.add_argument(
        "--hang-seconds",
        type=float,
        default=300.0,
        help="without an answer and without progress, before a restart (default: %(default)s)",
    )
    serve.add_argument(
        "--max-step-downs", type=int, default=3, help="leaner plans after running out of memory (default: %(default)s)"
    )

    profiles = add("profiles", "list the hardware profiles: which fit this machine, and why not")
    profiles.add_argument("model", type=Path, metavar="MODEL", nargs="?", help="also say which could run it")
    _add_machine(profiles)
    profiles.add_argument("--policy", help="quantization policy to assume for MODEL")
    profiles.add_argument("--json", action="store_true", help="print them as one JSON document")

    doctor = add("doctor", "check this machine for what is known to go wrong, with the remedy for each")
    doctor.add_argument("model", type=Path, metavar="MODEL", nargs="?", help="check this checkpoint too")
    _add_machine(doctor)
    doctor.add_argument("--profile", help="hardware profile (default: STEP128_PROFILE, else by the machine)")
    doctor.add_argument("--all-reduce", action="store_true", help="run a real all-reduce, time-limited")
    doctor.add_argument("--all-reduce-on-cpu", action="store_true", help="the same between CPU processes (gloo)")
    doctor.add_argument("--json", action="store_true", help="print the findings as one JSON document")

    calibrate = add("calibrate", "replace assumptions by what a start of vLLM on this machine measured")
    _add_state(calibrate)
    calibrate.add_argument("--log", type=Path, help="vLLM's log (default: vllm.log in the state folder)")
    calibrate.add_argument("--plan", type=Path, help="the plan it was started with (default: plan.json there)")
    calibrate.add_argument("--metrics", help="URL or file of vLLM's /metrics, if there is one")
    calibrate.add_argument("--json", action="store_true", help="print the comparison as one JSON document")

    status = add("status", "say how a server started by `step128 serve` is doing")
    _add_state(status)
    status.add_argument("--json", action="store_true", help="print it as one JSON document")
    status.add_argument("--stack", action="store_true", help="of the container stack instead: each service's health")
    add_project(status)

    add_stack_commands(add)
    return parser


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--machine", type=Path, metavar="DIR", help="a recorded machine, not this one")


def _add_state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=_port, default=DEFAULT_PORT, help="port of the API (default: %(default)s)")
    parser.add_argument(
        "--state-dir", type=Path, help="folder for log, key and status (default: ~/.local/state/step128/PORT)"
    )


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", nargs="?", help="checkpoint folder")
    parser.add_argument("--model", dest="model_option", type=Path, metavar="MODEL", help="the same, as an option")
    parser.add_argument("--profile", help="hardware profile (default: STEP128_PROFILE, else by the machine)")
    parser.add_argument("--objective", choices=OBJECTIVES, default="balanced", help="what to strive for")
    parser.add_argument("--max-model-len", type=_positive, help="context length in tokens")
    parser.add_argument("--num-speculative-tokens", type=int, choices=range(4), help="MTP depth")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), help="fp8 needs calibrated scales")
    parser.add_argument("--max-num-seqs", type=_positive, help="requests decoded at once")
    parser.add_argument("--max-num-batched-tokens", type=_positive, help="tokens of one scheduler step")
    parser.add_argument("--tensor-parallel-size", type=_positive, help="ranks the weights are cut into")
    parser.add_argument("--pipeline-parallel-size", type=_positive, default=1, help="refused: vLLM cannot with MTP")
    parser.add_argument("--enable-expert-parallel", action="store_true", help="whole experts on each rank")
    parser.add_argument("--attention-backend", help="one of the profile's")
    parser.add_argument(
        "--vision", action=argparse.BooleanOptionalAction, default=None, help="images; --no-vision saves the tower"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of activations and unquantized weights")
    parser.add_argument("--block-size", type=_positive, help="tokens of a KV-cache block")
    parser.add_argument(
        "--enforce-eager", action=argparse.BooleanOptionalAction, default=None, help="without torch.compile and graphs"
    )
    parser.add_argument(
        "--acceptance", type=_acceptance, help="measured MTP acceptance by position, such as 0.9,0.7,0.5"
    )
    parser.add_argument(
        "--acceptance-unconditional", action="store_true", help="they are shares of all steps, not of those before"
    )
    parser.add_argument("--memory", type=_size, help="budget of a GPU (of the host on a CPU), such as 6GiB")
    parser.add_argument("--served-model-name", help="model name in the API (default: the folder's name)")
    parser.add_argument("--host", type=_host, default="127.0.0.1", help="address to listen on (default: %(default)s)")
    _add_state(parser)
    _add_access(parser)


def _add_access(parser: argparse.ArgumentParser) -> None:
    default = AccessLimits()
    limits = parser.add_argument_group("limits of a request", "what is above them is refused before vLLM sees it")
    limits.add_argument(
        "--max-body-size",
        type=_size,
        default=default.max_body_bytes,
        help=f"of a request (default: {format_bytes(default.max_body_bytes)})",
    )
    limits.add_argument("--max-tokens-per-request", type=_positive, help="of an answer (default: the context)")
    limits.add_argument(
        "--max-images", type=_positive, default=default.max_images, help="in a request (default: %(default)s)"
    )
    limits.add_argument(
        "--max-image-size",
        type=_size,
        default=default.max_image_bytes,
        help=f"of one, as a file (default: {format_bytes(default.max_image_bytes)})",
    )
    limits.add_argument(
        "--max-image-pixels", type=_positive, default=default.max_image_pixels, help="of one (default: %(default)s)"
    )
    limits.add_argument(
        "--allow-media-domains",
        type=_domains,
        default=default.media_domains,
        metavar="HOST,HOST",
        help="hosts that vLLM may fetch images from, if they are public (default: none; images come in the request)",
    )


def _domains(text: str) -> tuple[str, ...]:
    names = tuple(part.strip().lower() for part in text.split(","))
    label = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    # A name whose last label is a number would be an address.
    if not all(len(name) < 254 and re.fullmatch(rf"({label}\.)+[a-z]([a-z0-9-]*[a-z0-9])?", name) for name in names):
        raise argparse.ArgumentTypeError("must be names such as images.example.org,cdn.example.org, and no addresses")
    return names


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


def _acceptance(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError("must look like 0.9,0.7,0.5") from error
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError("each must be from 0 to 1")
    return values


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
