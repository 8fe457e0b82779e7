"""Told to stop: the signal counts whenever it comes, also while something else goes wrong."""

import argparse
import os
import signal
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.commands import serving
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.supervisor.job import Patience
from step128_launcher.supervisor.process import ProcessGroup
from step128_launcher.supervisor.service import run_service
from step128_launcher.supervisor.signals import StopSignals
from step128_launcher.supervisor.status import ServerStatus, State

Bench = Any  # the class of the fixture `bench`; a test cannot import conftest.py


def end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def stopped_while_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal comes while what is left of a failed server is being killed."""
    kill = ProcessGroup.kill

    def kill_and_signal(group: ProcessGroup) -> list[int]:
        end()
        return kill(group)

    monkeypatch.setattr(ProcessGroup, "kill", kill_and_signal)


@pytest.mark.usefixtures("stopped_while_killed")
@pytest.mark.parametrize("mode", ["die", "memory", "refuse", "die_later"])
def test_a_signal_while_a_failed_server_is_killed(mode: str, bench: Bench) -> None:
    bench.leaner(2048)
    bench.patience = Patience(first_pause_seconds=0.05)
    assert bench.run(mode) is ExitCode.OK
    assert bench.starts() == 1 and bench.status.snapshot().state is State.STOPPED
    bench.assert_nothing_left()


def test_a_service_told_before_it_is_held_does_not_stay() -> None:
    def work() -> ExitCode:
        end()
        raise LauncherError(ExitCode.BAD_CONFIGURATION, "x")

    with StopSignals() as stop:
        assert run_service(work, ServerStatus(), lambda text: None, stop, service=True) is ExitCode.OK


def test_a_signal_while_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default handler would end the process by the signal; nothing is started after it."""
    monkeypatch.setattr(serving, "make_planned", lambda options, with_fallbacks: end())
    monkeypatch.setattr(serving, "_check_servable", lambda planned: None)
    options = argparse.Namespace(dry_run=False, service=False, metrics_port=0)
    handler = signal.getsignal(signal.SIGTERM)
    assert serving.run_serve(options) is ExitCode.OK
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_unexpected_error_is_held_by_a_service(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> ExitCode:
        raise RuntimeError("secret")

    status, said = ServerStatus(), list[str]()
    with StopSignals() as stop:
        threading.Timer(0.2, end).start()
        assert run_service(work, status, said.append, stop, service=True) is ExitCode.OK
    failure = status.snapshot().failure
    assert failure is not None and failure.exit_code == ExitCode.INTERNAL and "secret" not in failure.public
    assert "RuntimeError('secret')" in said[0] and "Traceback" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        run_service(work, status, said.append, StopSignals(), service=False)


def test_processes_that_cannot_be_killed_are_not_started_beside(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    kill = ProcessGroup.kill
    monkeypatch.setattr(ProcessGroup, "kill", lambda group: [*kill(group), 4711])
    bench.patience = Patience(first_pause_seconds=0.05)
    error = bench.fail("die_later", "ok")
    assert "4711 could not be killed" in error.message and bench.starts() == 1


def test_kill_tells_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = ProcessGroup([sys.executable, "-S", "-c", "import time; time.sleep(60)"], os.environ, tmp_path / "log", 5.0)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(ProcessGroup, "_kill_members", lambda *arguments, **names: None)
            assert group.pid in group.kill()
    finally:
        assert group.kill() == []


def test_a_port_that_stays_busy_can_be_stopped_waiting_for(bench: Bench) -> None:
    bench.patience = Patience(service=True)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", bench.job.server.port))
        busy.listen()
        threading.Timer(0.3, end).start()
        assert bench.run("ok") is ExitCode.OK
    assert "waiting at most 16 s" in bench.text() and not Path(bench.spec["starts_file"]).exists()


def test_a_busy_port_is_waited_for(bench: Bench) -> None:
    bench.patience = replace(bench.patience, service=True)
    busy = socket.socket()
    busy.bind(("127.0.0.1", bench.job.server.port))
    busy.listen()
    threading.Timer(0.3, busy.close).start()
    assert bench.run("ok", signals=(signal.SIGTERM,)) is ExitCode.OK
    assert bench.starts() == 1


def test_a_disk_that_is_full_at_a_restart_ends_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        if Path(bench.spec["starts_file"]).exists():
            raise LauncherError(ExitCode.CANNOT_WRITE, "The disk is full.")

    monkeypatch.setattr("step128_launcher.supervisor.state_files.write_atomically", full)
    bench.patience = Patience(first_pause_seconds=0.05)
    assert bench.run("die_later", "ok", signals=(signal.SIGTERM,), starts=2) is ExitCode.OK
    assert bench.starts() == 2


def test_a_log_that_cannot_be_followed_ends_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(follower: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("step128_launcher.supervisor.attempt.LogFollower.new_lines", unreadable)
    assert bench.run("ok", signals=(signal.SIGTERM,)) is ExitCode.OK
    assert bench.text().count("Permission denied") == 1
