"""`step128 up`, `status`, `logs` and `down` against a real engine, in a folder laid out as a user has it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from container_stack import ROOT, Stack, Timed, fetch

pytestmark = pytest.mark.proof
Cli = Callable[..., subprocess.CompletedProcess[str]]


def lay_out(stack: Stack, folder: Path) -> None:
    """Copy what a checkout has, and make .env from .env.example, as the README says."""
    for path in ROOT.glob("compose*.yaml"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "configs", folder / "configs")
    text = (ROOT / ".env.example").read_text()
    wanted = {name: value for name, value in stack.settings.items() if name != "CA_BUNDLE"}
    for name, value in wanted.items():
        text, found = re.subn(rf"^#?{name}=.*$", f"{name}={value}", text, flags=re.M)
        assert found == 1, name
    (folder / ".env").write_text(text)


def test_up_status_logs_and_down(built: Stack, cli: Cli, tmp_path: Path, times: Timed) -> None:
    lay_out(built, tmp_path)
    environment = {"DOCKER_HOST": built.engine.environment.get("DOCKER_HOST", "unix:///var/run/docker.sock")}
    options = ("--project-directory", tmp_path, "--project-name", "step128proofcommands")

    def step128(*arguments: str) -> subprocess.CompletedProcess[str]:
        return cli("step128", arguments[0], *options, *arguments[1:], environment=environment)

    try:
        with times("step128 up"):
            up = step128("up", "--cpu")
        print(f"\n{up.stdout}{up.stderr}")
        assert up.returncode == 0, up.stdout + up.stderr
        assert fetch(f"{built.api}/v1/models", key=built.key).status == 200
        status = step128("status", "--stack")
        assert status.returncode == 0 and status.stdout.count("healthy") >= 3, status.stdout + status.stderr
        logs = step128("logs", "serve")
        assert logs.returncode == 0 and "Ready: " in logs.stdout + logs.stderr
    finally:
        down = step128("down", "--volumes", "--yes")
    assert down.returncode == 0, down.stdout + down.stderr
    listed = built.engine.docker("volume", "ls", "--quiet", "--filter", "name=step128proofcommands").stdout
    assert not listed.strip()
