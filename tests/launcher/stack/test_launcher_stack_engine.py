"""What stands in the way of Docker itself: each ends at once with what was found, what is needed and what to do."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import DockerException
from requests import ConnectionError as LostConnectionError

Bench = Any  # the class of the fixture `bench`; a test cannot import conftest.py
COMMANDS = [("up",), ("down",), ("logs",), ("status", "--stack")]


@pytest.mark.parametrize("command", COMMANDS)
def test_docker_is_not_installed(bench: Bench, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(bench.folder))
    result = bench.run(*command)
    assert result.code == 69
    assert "Docker is not installed" in result.err and "docs.docker.com/engine/install" in result.err
    assert "25.0 or newer" in result.err and "2.26 or newer" in result.err


@pytest.mark.parametrize("command", COMMANDS)
def test_the_engine_does_not_run(
    bench: Bench, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the real SDK, which wraps the system's error three times."""
    monkeypatch.undo()
    monkeypatch.chdir(bench.folder)
    monkeypatch.setenv("PATH", f"{bench.fake}:/usr/bin:/bin")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    result = bench.run(*command)
    assert result.code == 69
    assert f"its socket {tmp_path}/none.sock does not exist" in result.err and "systemctl enable --now" in result.err
    left = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(left))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{left}")
    assert f"its socket {left} answers nobody" in bench.run(*command).err


def test_the_socket_may_not_be_used(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def denied(base_url: str, timeout: int) -> None:
        try:
            try:
                raise PermissionError(errno.EACCES, "Permission denied")
            except PermissionError as error:
                raise LostConnectionError("Connection aborted.") from error
        except LostConnectionError as error:
            raise DockerException("Error while fetching server API version") from error

    monkeypatch.setattr(docker, "DockerClient", denied)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}")
    result = bench.run("up")
    assert result.code == 5
    assert f"permission denied on {tmp_path} (group " in result.err
    assert "sudo usermod -aG docker $USER" in result.err and "root's rights" in result.err


@pytest.mark.parametrize("host", ["ssh://me@elsewhere", "tcp://10.0.0.1:2376"])
def test_an_engine_elsewhere_is_not_for_these_checks(bench: Bench, host: str) -> None:
    bench.set("context", f"{host}\n")
    result = bench.run("up")
    assert result.code == 78 and host in result.err and "docker context use default" in result.err


@pytest.mark.parametrize(
    ("release", "components", "said"),
    [
        ("20.10.24+dfsg1", ("Engine",), "The Docker engine is 20.10.24+dfsg1; needed is 25.0 or newer"),
        ("5.4.2", ("Podman Engine",), "What answers is Podman Engine 5.4.2; needed is Docker's own engine"),
        ("unknown", ("Engine",), "The Docker engine is unknown; needed"),
    ],
)
def test_an_engine_that_will_not_do(bench: Bench, release: str, components: tuple[str, ...], said: str) -> None:
    bench.engine.release, bench.engine.components = release, components
    result = bench.run("up")
    assert result.code == 69 and said in result.err
    assert not [call for call in bench.calls() if " up " in call]


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("", "the compose plugin is missing; needed is 2.26 or newer"),
        ("2.24.7\n", "Compose is 2.24.7; needed is 2.26 or newer"),
        ("v1.29.2\n", "Compose is v1.29.2; needed"),
    ],
)
def test_a_compose_that_will_not_do(bench: Bench, version: str, said: str) -> None:
    bench.set("compose_version", version)
    result = bench.run("up")
    assert result.code == 69 and said in result.err and "docker" in result.err.splitlines()[-1]


@pytest.mark.parametrize("command", [*COMMANDS, ("up", "--lock")])
def test_an_engine_that_goes_away_in_the_middle_leaves_no_traceback(bench: Bench, command: tuple[str, ...]) -> None:
    bench.engine.fails = LostConnectionError("Connection aborted.")
    result = bench.run(*command)
    assert result.code == 69
    assert "stopped answering: Connection aborted." in result.err and "Traceback" not in result.err
