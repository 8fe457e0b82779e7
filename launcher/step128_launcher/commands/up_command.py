"""`step128 up`: checks, `docker compose up -d`, and a line that says how far it is until everything answers."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from step128_launcher import consoles
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.files import write_atomically
from step128_launcher.machine.reader import exists
from step128_launcher.stack.checks import Check, check_machine
from step128_launcher.stack.compose import LOCK, Compose
from step128_launcher.stack.engine import check_versions, connect, engine_errors, find_docker
from step128_launcher.stack.images import check_images, lock_text, pin_images
from step128_launcher.stack.project import SERVER, Project, image_variables, read_project
from step128_launcher.stack.services import own_ports, read_states
from step128_launcher.stack.waiting import failure, find_failed, wait_until_up


@engine_errors()
def run_up(options: argparse.Namespace) -> ExitCode:
    """Check, start and wait. Arguments (argparse names): see stack_options.

    Raises:
        LauncherError: with the first failed check's exit code, before anything is started; the launcher's own, if the
            server ends in failure; 69, if another service does, or it takes too long.

    """
    console = consoles.stderr()
    command = find_docker()
    client = connect(command)
    _print_check(console, Check("docker", check_versions(client, command)))
    folder = options.project_directory.resolve()
    compose = Compose(
        command=command,
        folder=folder,
        overlays=("cpu", *options.overlays) if options.cpu else tuple(options.overlays),
        profiles=tuple(options.profiles),
        project=options.project_name,
        locked=exists(folder / LOCK) and not options.lock,
    )
    project = read_project(compose.read())
    if compose.locked:
        _say(console, f"Images are pinned by {folder / LOCK}.")
    _check(console, client, project)
    if options.lock:
        _lock(console, client, compose, project)
        compose = Compose(command, folder, compose.overlays, compose.profiles, compose.project, locked=True)
    if options.check:
        return ExitCode.OK
    _start(console, client, compose, project, options.build)
    names = [service.name for service in project.services]
    with _waiting_line(console) as show:
        wait_until_up(client, project.name, names, show, options.timeout)
    _print_addresses(console, project)
    return ExitCode.OK


def _check(console: Console, client: Any, project: Project) -> None:
    failed = []
    for check in (*check_machine(project, own_ports(client, project.name)), *check_images(client, project)):
        _print_check(console, check)
        if check.exit_code is not ExitCode.OK:
            failed.append(check)
    if failed:
        count = "One check" if len(failed) == 1 else f"{len(failed)} checks"
        raise LauncherError(failed[0].exit_code, f"{count} failed (above), so nothing was started.")


def _lock(console: Console, client: Any, compose: Compose, project: Project) -> None:
    pins = pin_images(client, project, image_variables(compose.read(filled_in=False)))
    for pin in pins:
        _say(console, f"{pin.variable}: {pin.pinned or pin.image} ({pin.note})")
    if not any(pin.pinned for pin in pins):
        raise LauncherError(
            ExitCode.SERVER_FAILED,
            f"No image has a digest that could be found out, so {LOCK} was not written and nothing was started.",
            "It takes the network, or images that were pulled from a registry. Without --lock the tags are used.",
        )
    write_atomically(compose.folder / LOCK, lock_text(pins, time.strftime("%Y-%m-%d")), 0o644)
    unverified = ", ".join(pin.image for pin in pins if not pin.verified)
    _say(console, f"Written: {compose.folder / LOCK}." + (f" Unverified: {unverified}." if unverified else ""))


def _start(console: Console, client: Any, compose: Compose, project: Project, build: bool) -> None:
    """Start the services; one that was given up is started anew, or its old failure would be all there is to see."""
    given_up = [state.service for state in read_states(client, project.name) if state.health == "unhealthy"]
    known = [name for name in given_up if project.service(name)]
    if known:
        _say(console, f"Unhealthy, so started anew: {', '.join(known)}.")
        compose.run("stop", *known)
    code = compose.run("up", "--detach", *(["--build"] if build else []))
    if code == 0:
        return
    states = {state.service: state for state in read_states(client, project.name)}
    bad = find_failed(states, [service.name for service in project.services], {})
    if bad is not None:
        raise failure(client, project.name, bad)
    raise LauncherError(
        ExitCode.SERVER_FAILED,
        f"`docker compose up` failed (exit status {code}); what it said is above.",
        "`step128 status --stack` says what is there; `step128 down` removes it.",
    )


@contextlib.contextmanager
def _waiting_line(console: Console) -> Iterator[Callable[[str], None]]:
    """Give what shows a line: the same one again on a terminal, elsewhere a new one where the text is another."""
    began, last = time.monotonic(), ""
    status = console.status("starting") if console.is_terminal else None

    def show(text: str) -> None:
        nonlocal last
        if status is not None:
            status.update(_plain(f"{text} … {time.monotonic() - began:.0f} s"))
        elif text != last:
            _say(console, f"[{time.monotonic() - began:5.1f} s] {text}")
        last = text

    try:
        with status or contextlib.nullcontext():
            yield show
    except KeyboardInterrupt:
        _say(console, "The start goes on by itself: `step128 status --stack`, `step128 logs -f`, `step128 down`.")
        raise


def _print_check(console: Console, check: Check) -> None:
    fine = check.exit_code is ExitCode.OK
    console.print("PASS " if fine else "FAIL ", style="green" if fine else "red", end="")
    _say(console, f"{check.name}: {check.detail}")
    if check.remedy:
        _say(console, f"     {check.remedy}")


def _print_addresses(console: Console, project: Project) -> None:
    for service in project.services:
        for port in service.ports:
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(port.address, port.address)
            url = f"http://[{host}]:{port.port}" if ":" in host else f"http://{host}:{port.port}"
            key = service.secrets.get("api_key") if service.name == SERVER else None
            if key is not None:
                _say(console, f"{service.name}: {url}/v1, and a first question to it:")
                _say(console, f'  curl -H "Authorization: Bearer $(cat {_near(key)})" {url}/v1/models')
            else:
                password = service.secrets.get("grafana_password")
                _say(console, f"{service.name}: {url}" + (f", password in {_near(password)}" if password else ""))


def _near(path: Path) -> Path:
    """Return the path from here, where it is below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
