"""The Docker engine of this machine, by the docker SDK, and the `docker` command, which compose is a plugin of."""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
from docker.errors import DockerException
from requests import RequestException

from step128_launcher.errors import ExitCode, LauncherError

LEAST_ENGINE, LEAST_COMPOSE = (25, 0), (2, 26)
_TIMEOUT_SECONDS = 60
_STDERR = 2  # results go to stdout, what compose says of its work does not
_INSTALL = "https://docs.docker.com/engine/install/ tells how for each distribution"


@dataclass(frozen=True)
class DockerCommand:
    """The `docker` program; `environment` is what it runs with."""

    program: str
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def capture(self, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run it and keep what it prints."""
        return subprocess.run(
            [self.program, *arguments],
            cwd=folder,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )

    def show(self, *arguments: str, folder: Path | None = None, to_stdout: bool = False) -> int:
        """Run it with what it prints going to the user's terminal; return its exit status."""
        return subprocess.run(
            [self.program, *arguments],
            cwd=folder,
            env=dict(self.environment),
            stdout=None if to_stdout else _STDERR,
            check=False,
        ).returncode

    def engine_address(self) -> str:
        """Return the URL of the engine that it talks to: DOCKER_HOST, else that of its context."""
        if self.environment.get("DOCKER_HOST"):
            return self.environment["DOCKER_HOST"]
        shown = self.capture("context", "inspect", "--format", "{{.Endpoints.docker.Host}}")
        return shown.stdout.strip() or "unix:///var/run/docker.sock"


def find_docker() -> DockerCommand:
    """Return the `docker` command.

    Raises:
        LauncherError: 69, if there is none.

    """
    program = shutil.which("docker")
    if program is None:
        raise LauncherError(
            ExitCode.SERVER_FAILED,
            "Docker is not installed: there is no `docker` command.",
            f"{_INSTALL}; needed are the engine {_text(LEAST_ENGINE)} or newer and its compose plugin "
            f"{_text(LEAST_COMPOSE)} or newer. Without Docker: step128 serve MODEL.",
        )
    return DockerCommand(program)


def connect(command: DockerCommand) -> Any:
    """Return the SDK's client of this machine's engine (docker.DockerClient).

    Raises:
        LauncherError: 78, if the engine is another machine's; 69, if none answers; 5, if it may not be used.

    """
    address = command.engine_address()
    if not address.startswith("unix://"):
        raise LauncherError(
            ExitCode.BAD_CONFIGURATION,
            f"Docker is set to the engine at {address}; needed is the one of this machine (unix://...).",
            "The devices, folders and ports of the machine that step128 runs on are checked, so run it over there; or "
            "unset DOCKER_HOST, or `docker context use default`.",
        )
    try:
        client = docker.DockerClient(base_url=address, timeout=_TIMEOUT_SECONDS)
        client.ping()
    except (DockerException, OSError) as error:
        raise _unreachable(Path(address.removeprefix("unix://")), error) from error
    return client


def check_versions(client: Any, command: DockerCommand) -> str:
    """Return the versions found, in words.

    Raises:
        LauncherError: 69, if the engine or compose is too old, another program, or not there.

    """
    found = client.version()
    names = [part.get("Name", "") for part in found.get("Components") or []]
    other = next((name for name in names if "podman" in name.lower()), None)
    if other is not None:
        raise LauncherError(
            ExitCode.SERVER_FAILED,
            f"What answers is {other} {found['Version']}; needed is Docker's own engine, {_text(LEAST_ENGINE)} or "
            "newer: the stack was tried with no other.",
            _INSTALL + ".",
        )
    if _version(found["Version"]) < LEAST_ENGINE:
        raise LauncherError(
            ExitCode.SERVER_FAILED,
            f"The Docker engine is {found['Version']}; needed is {_text(LEAST_ENGINE)} or newer, for "
            "healthcheck.start_interval.",
            f"Update it: {_INSTALL}; Debian 13 has 26.1.",
        )
    asked = command.capture("compose", "version", "--short")
    compose = asked.stdout.strip()
    if asked.returncode or not _version(compose):
        raise LauncherError(
            ExitCode.SERVER_FAILED,
            f"`docker compose` does not run: the compose plugin is missing; needed is {_text(LEAST_COMPOSE)} or newer.",
            "Install docker-compose-plugin (Docker's own packages), docker-compose (Debian 13) or docker-compose-v2 "
            "(Ubuntu). The older `docker-compose` with a hyphen, version 1, is another program and does not do.",
        )
    if _version(compose) < LEAST_COMPOSE:
        raise LauncherError(
            ExitCode.SERVER_FAILED,
            f"Compose is {compose}; needed is {_text(LEAST_COMPOSE)} or newer.",
            f"Update the plugin; `docker compose version` shows which one runs. {_INSTALL}.",
        )
    return f"engine {found['Version']}, compose {compose}"


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
    """Turn what the SDK raises when the engine fails in the middle of a command into an error for a person.

    Raises:
        LauncherError: 69, in the place of the SDK's and its HTTP library's errors.

    """
    try:
        yield
    except (DockerException, RequestException) as error:
        raise LauncherError(
            ExitCode.SERVER_FAILED,
            f"The Docker engine failed, or stopped answering: {error}",
            "`sudo systemctl status docker`, `sudo journalctl -u docker -n 50`; then the same command again.",
        ) from error


def _unreachable(socket: Path, error: Exception) -> LauncherError:
    """Return the error to show for a socket that cannot be used."""
    number = _error_number(error)
    if number in (errno.EACCES, errno.EPERM):
        return LauncherError(
            ExitCode.PERMISSION,
            f"You may not use the Docker engine: permission denied on {socket}{_group_of(socket)}.",
            "`sudo usermod -aG docker $USER`, then log in again (members of that group have root's rights on this "
            "machine); or run this with sudo.",
        )
    if number in (errno.ENOENT, errno.ECONNREFUSED):
        what = "does not exist" if number == errno.ENOENT else "answers nobody"
        return LauncherError(
            ExitCode.SERVER_FAILED,
            f"The Docker engine does not run: its socket {socket} {what}.",
            "`sudo systemctl enable --now docker` (rootless: `systemctl --user enable --now docker`); if it does not "
            "stay up: `sudo journalctl -u docker -n 50`.",
        )
    return LauncherError(ExitCode.SERVER_FAILED, f"The Docker engine at {socket} cannot be asked: {error}.")


def _error_number(error: BaseException | None) -> int | None:
    """Return the errno that an exception of the SDK goes back to."""
    while error is not None:
        if isinstance(error, OSError) and isinstance(error.errno, int):
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _group_of(path: Path) -> str:
    try:
        return f" (group {grp.getgrgid(path.stat().st_gid).gr_name})"
    except (OSError, KeyError):
        return ""


def _version(text: str) -> tuple[int, ...]:
    found = re.match(r"v?(\d+(?:\.\d+)+)", text)
    return tuple(int(part) for part in found[1].split(".")) if found else ()


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
