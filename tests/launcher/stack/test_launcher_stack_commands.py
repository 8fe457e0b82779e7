"""`step128 status --stack`, `logs` and `down`, and the help of all."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from step128_launcher.cli import main

Bench = Any  # the classes of conftest.py; a test cannot import it
Container = Any
VOLUMES = ["step128_grafana-data", "step128_state", "step128_vllm-cache"]


def test_status_of_a_stack_that_is_up(bench: Bench, up_and_well: Callable[[], list[Container]]) -> None:
    bench.engine.found = up_and_well()
    result = bench.run("status", "--stack")
    assert result.code == 0
    serve = next(line for line in result.out.splitlines() if line.startswith("serve"))
    assert serve.split()[:4] == ["serve", "running", "healthy", "0"]
    assert "127.0.0.1:18000->8000/tcp" in serve and "image:1" in serve and "Launcher: ready" in result.out
    document = json.loads(bench.run("status", "--stack", "--json").out)
    assert document["project"] == "step128" and document["server"] == {"state": "ready"}
    (grafana, serve) = document["services"]
    assert serve["ports"] == ["127.0.0.1:18000->8000/tcp"] and serve["up"] and serve["uptime_seconds"] >= 0
    assert grafana["health"] == "healthy" and grafana["restarts"] == 0


def test_status_of_a_stack_that_is_not_well(bench: Bench, up_and_well: Callable[[], list[Container]]) -> None:
    container = type(up_and_well()[0])
    launcher = {"state": "failed", "reason": "no such model", "hint": "Set MODEL."}
    bench.engine.found = [
        container("serve", ("running", "unhealthy"), launcher=launcher),
        container("grafana", ("exited", "unhealthy"), exit_code=137, restarts=2, says="refused"),
        container("serve", ("running", None), labels={"com.docker.compose.oneoff": "True"}),
    ]
    result = bench.run("status", "--stack")
    assert result.code == 69
    assert "exited (137)" in result.out and "Launcher: failed no such model Set MODEL." in result.out
    assert "grafana: refused" in result.out
    document = json.loads(bench.run("status", "--stack", "--json").out)
    assert [(each["service"], each["health"]) for each in document["services"]] == [
        ("grafana", "unhealthy"),
        ("serve", "unhealthy"),
    ], "the container of `docker compose run` is not the service's"


@pytest.mark.parametrize("command", [("status", "--stack"), ("logs",)])
def test_nothing_there(bench: Bench, command: tuple[str, ...], up_and_well: Callable[[], list[Container]]) -> None:
    result = bench.run(*command)
    assert result.code == 66 and "There is no container of step128." in result.err
    bench.engine.found = up_and_well()
    (bench.folder / ".env").write_text("PORT=1\nCOMPOSE_PROJECT_NAME=other\n")
    assert "There is no container of other." in bench.run(*command).err
    assert "There is no container of mine." in bench.run(*command, "--project-name", "mine").err


def test_logs(bench: Bench, up_and_well: Callable[[], list[Container]]) -> None:
    bench.engine.found = up_and_well()
    assert bench.run("logs").code == 0
    assert bench.calls()[-1] == "compose --project-name step128 logs --tail 200"
    assert bench.run("logs", "serve", "-f", "--tail", "5").code == 0
    assert bench.calls()[-1] == "compose --project-name step128 logs --tail 5 --follow serve"
    result = bench.run("logs", "nosuch")
    assert result.code == 2 and "It has: grafana, serve." in result.err


def test_down_says_what_stays(bench: Bench, up_and_well: Callable[[], list[Container]]) -> None:
    bench.engine.found, bench.engine.volume_names = up_and_well(), VOLUMES
    result = bench.run("down")
    assert result.code == 0
    assert bench.calls()[-1] == "compose --project-name step128 down --remove-orphans"
    assert f"Its volumes stay, for the next start: {', '.join(VOLUMES)}" in result.err
    assert "Checkpoints, .env, secrets and images are as they were." in result.err
    bench.engine.found = []
    result = bench.run("down")
    assert result.code == 0 and "Nothing of step128 is up. Its volumes stay" in result.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "removed"), [("y\n", True), ("YES\n", True), ("\n", False), ("", False)])
def test_down_asks_before_volumes_are_removed(
    bench: Bench,
    up_and_well: Callable[[], list[Container]],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    removed: bool,
) -> None:
    bench.engine.found, bench.engine.volume_names = up_and_well(), VOLUMES
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    result = bench.run("down", "--volumes")
    assert result.code == 0
    assert "step128_state: the server's logs, plan and calibration" in result.err
    assert "step128_vllm-cache: compiled kernels" in result.err
    called = "compose --project-name step128 down --remove-orphans --volumes"
    assert (called in bench.calls()) is removed and ("Nothing was done." in result.err) is not removed


def test_down_without_a_terminal_needs_yes(
    bench: Bench, up_and_well: Callable[[], list[Container]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.engine.volume_names = VOLUMES  # of a stack that was taken down before
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    result = bench.run("down", "--volumes")
    assert result.code == 2 and "Add --yes." in result.err and not [call for call in bench.calls() if "down" in call]
    assert bench.run("down", "--volumes", "--yes").code == 0
    assert bench.calls()[-1].endswith("down --remove-orphans --volumes")


@pytest.mark.parametrize("command", ["secrets", "up", "logs", "down", "status"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "exit codes:" in text and max(map(len, text.splitlines())) < 120
