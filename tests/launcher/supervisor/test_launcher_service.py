"""Service mode: what a restart cannot cure leaves the launcher up but unhealthy, with the reason where one looks."""

import json
import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from step128_launcher.errors import CheckpointError, ExitCode, LauncherError
from step128_launcher.planning.plan import DoesNotFitError
from step128_launcher.supervisor.exporter import Exporter
from step128_launcher.supervisor.hang import Activity
from step128_launcher.supervisor.job import Patience
from step128_launcher.supervisor.service import hold_unhealthy, run_service
from step128_launcher.supervisor.signals import StopSignals
from step128_launcher.supervisor.status import ServerStatus, State

Bench = Any  # the class of the fixture `bench`; a test cannot import conftest.py


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def exporter(bench: Bench) -> Iterator[int]:
    port: int = bench.free_port()
    exporter = Exporter(bench.status, "127.0.0.1", port)
    yield port
    exporter.close()


@pytest.mark.parametrize(
    "error",
    [
        LauncherError(ExitCode.BAD_CONFIGURATION, "No profile 'x'.", "Profiles: cpu."),
        DoesNotFitError("It does not fit.", "Buy memory.", Any),  # type: ignore[arg-type]
        LauncherError(ExitCode.UNSUPPORTED_HARDWARE, "No GPU."),
        LauncherError(ExitCode.PERMISSION, "Not yours."),
        CheckpointError("model-00001-of-00002.safetensors is cut short."),
        LauncherError(ExitCode.INPUT_NOT_FOUND, "No such folder."),
        LauncherError(ExitCode.VERIFICATION_FAILED, "1 of 9 checks failed."),
        LauncherError(ExitCode.CANNOT_WRITE, "The disk is full."),
    ],
    ids=lambda error: error.exit_code.name,
)
def test_an_error_before_there_is_a_plan_is_held(error: LauncherError, bench: Bench, exporter: int) -> None:
    def work() -> ExitCode:
        raise error

    said: list[str] = []
    answers: list[tuple[int, str]] = []

    def look_then_end() -> None:
        bench.wait_for(lambda: bool(said))
        answers.extend([get(exporter, "/health"), get(exporter, "/metrics")])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look_then_end, daemon=True).start()
    with StopSignals() as stop:
        assert run_service(work, bench.status, said.append, stop, service=True) is ExitCode.OK
    assert len(said) == 1 and error.message in said[0] and error.hint in said[0]
    (status, body), (_, metrics) = answers
    code = int(error.exit_code)
    assert status == 503
    expected = {"state": "failed", "reason": error.message, "hint": error.hint, "exit_code": code}
    assert json.loads(body) == expected
    assert f'step128_server_failed{{exit_code="{code}"}} 1.0' in metrics
    assert "step128_plan_max_model_len_tokens" not in metrics


def test_by_hand_it_ends_with_the_code(bench: Bench) -> None:
    def work() -> ExitCode:
        raise CheckpointError("broken")

    with pytest.raises(CheckpointError, match="broken"):
        run_service(work, bench.status, print, StopSignals(), service=False)


@pytest.mark.parametrize(
    ("mode", "code"),
    [("refuse", 65), ("late_port", 75), ("memory", 3), ("die", 69), ("die_later", 69)],
)
def test_a_server_that_cannot_be_kept_up_is_held(mode: str, code: int, bench: Bench, exporter: int) -> None:
    bench.patience = Patience(max_restarts=1, first_pause_seconds=0.05)
    answers: list[tuple[int, str]] = []

    def look_then_end() -> None:
        bench.wait_for(lambda: bench.status.snapshot().failure is not None)
        answers.append(get(exporter, "/health"))
        bench.wait_for(lambda: bool(said))
        os.kill(os.getpid(), signal.SIGTERM)

    said: list[str] = []
    threading.Thread(target=look_then_end, daemon=True).start()
    with StopSignals() as bench.stop:
        assert run_service(partial(bench.run, mode), bench.status, said.append, bench.stop, service=True) is ExitCode.OK
    status, body = answers[0]
    assert status == 503 and json.loads(body)["exit_code"] == code
    assert f"(exit code {code}, " in said[0]
    bench.assert_nothing_left()


def test_health_follows_the_server(bench: Bench, exporter: int) -> None:
    seen: list[tuple[int, str]] = []

    def look_then_end() -> None:
        bench.wait_for(lambda: bench.status.snapshot().state is State.READY)
        seen.append(get(exporter, "/health"))
        os.kill(os.getpid(), signal.SIGTERM)

    before = get(exporter, "/health")
    threading.Thread(target=look_then_end, daemon=True).start()
    assert bench.run() is ExitCode.OK
    assert (before[0], json.loads(before[1])) == (503, {"state": "planned"})
    assert [(code, json.loads(body)) for code, body in seen] == [(200, {"state": "ready"})]
    assert json.loads(get(exporter, "/health")[1]) == {"state": "stopped"}
    assert get(exporter, "/")[0] == 404 and get(exporter, "/metrics/x")[0] == 404


def test_a_hung_server_says_so(bench: Bench, exporter: int) -> None:
    bench.status.enter(State.READY)
    bench.status.probed(False)
    bench.status.hangs(Activity.BUSY)
    status, body = get(exporter, "/health")
    assert status == 503 and "1 health checks; it is busy (working or spinning" in json.loads(body)["reason"]
    metrics = get(exporter, "/metrics")[1]
    assert 'step128_server_hung{kind="busy"} 1.0' in metrics and 'step128_server_hung{kind="idle"} 0.0' in metrics


def test_troubles_are_counted(bench: Bench, exporter: int) -> None:
    for reason in ("crash", "crash", "hung"):
        bench.status.restarted(reason, LauncherError(ExitCode.SERVER_FAILED, reason))
    bench.status.stepped_down(LauncherError(ExitCode.SERVER_FAILED, "memory"))
    metrics = get(exporter, "/metrics")[1]
    assert 'step128_server_restarts_total{reason="crash"} 2.0' in metrics
    assert 'step128_server_restarts_total{reason="hung"} 1.0' in metrics
    assert "step128_server_step_downs_total 1.0" in metrics


def test_the_handlers_of_signals_are_put_back() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    error = LauncherError(ExitCode.BAD_CONFIGURATION, "x")
    with StopSignals() as stop:
        assert hold_unhealthy(error, ServerStatus(), lambda text: None, stop) is ExitCode.OK
    assert signal.getsignal(signal.SIGTERM) is handler
