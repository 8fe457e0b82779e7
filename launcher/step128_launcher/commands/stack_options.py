"""The options of the commands that look after the container stack: up, down, logs, secrets, and status --stack."""

import argparse
from collections.abc import Callable
from pathlib import Path

OVERLAYS = ("cdi", "rocm-compat")


def add_stack_commands(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the commands; `add` takes a name and a summary, and returns the parser of the command's options."""
    secrets = add("secrets", "make the API key, metrics token and Grafana password of the container stack")
    secrets.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        nargs="?",
        help="where to (default: SECRETS_DIR, else ./secrets); what is there is kept",
    )
    secrets.add_argument("--rotate", action="store_true", help="replace those that are there")
    _add_up(add("up", "check this machine, start the container stack, and wait until it answers"))

    logs = add("logs", "show what the stack's services print")
    logs.add_argument("service", metavar="SERVICE", nargs="?", help="serve, prometheus or grafana (default: all)")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C")
    logs.add_argument("--tail", type=_count, default=200, metavar="N", help="last lines of each (default: %(default)s)")
    add_project(logs)

    down = add("down", "stop the stack and remove its containers and networks; volumes stay")
    down.add_argument("--volumes", action="store_true", help="remove its volumes too: caches, logs, metrics, Grafana")
    down.add_argument("--yes", action="store_true", help="do not ask before volumes are removed")
    add_project(down)


def add_project(parser: argparse.ArgumentParser) -> None:
    """Add what names the stack."""
    parser.add_argument(
        "--project-directory",
        type=Path,
        metavar="DIR",
        default=Path(),
        help="folder with compose.yaml and .env (default: this one)",
    )
    parser.add_argument(
        "--project-name",
        metavar="NAME",
        help="of the stack's containers (default: COMPOSE_PROJECT_NAME, else step128)",
    )


def _add_up(up: argparse.ArgumentParser) -> None:
    up.add_argument(
        "--profile",
        action="append",
        dest="profiles",
        default=[],
        help="compose profile, such as monitoring (default: COMPOSE_PROFILES in .env)",
    )
    up.add_argument("--cpu", action="store_true", help="without a GPU: adds compose.cpu.yaml, for small checkpoints")
    up.add_argument(
        "--overlay",
        action="append",
        dest="overlays",
        choices=OVERLAYS,
        default=[],
        help="add compose.NAME.yaml; with this or --cpu, COMPOSE_FILE in .env is not read",
    )
    up.add_argument(
        "--lock",
        action="store_true",
        help="resolve the images' tags to digests in images.lock.env first; while that file is there, it is used",
    )
    up.add_argument("--build", action="store_true", help="build the image anew, even if there is one")
    up.add_argument("--check", action="store_true", help="only check (and lock, with --lock); start nothing")
    up.add_argument(
        "--timeout",
        type=_count,
        default=3900,
        metavar="SECONDS",
        help="to wait until all are up (default: %(default)s: reading weights and compiling kernels take long)",
    )
    add_project(up)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
