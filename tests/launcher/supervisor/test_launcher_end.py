"""How a run ends: whatever happens to the launcher, vLLM is taken down and nothing is left."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.errors import ExitCode
from step128_launcher.files import cannot_write
from step128_launcher.supervisor import process
from step128_launcher.supervisor.log_cap import cap_log, keep_earlier_logs
from step128_launcher.supervisor.process import ProcessGroup
from step128_launcher.supervisor.procfs import group_members
from step128_launcher.supervisor.status import State

Bench = Any  # the class of the fixture `bench`; a test cannot import conftest.py


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_other_ways_to_be_told_to_end(number: signal.Signals, bench: Bench) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP starts ignored, and would stay so
    try:
        assert bench.run(signals=(number,)) is ExitCode.OK
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    bench.assert_nothing_left()


def test_nohup_is_respected(bench: Bench) -> None:
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert bench.run(signals=(signal.SIGHUP, signal.SIGTERM)) is ExitCode.OK
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert "killed at once" not in bench.text()  # one signal counted, not two


def test_a_killed_launcher_takes_vllm_with_it(tmp_path: Path, bench: Bench) -> None:
    script = (
        "import os, sys, time; from pathlib import Path; from step128_launcher.supervisor.process import ProcessGroup; "
        "group = ProcessGroup([sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(60)'], "
        "os.environ, Path(sys.argv[1]), 0.3); print(group.pid, flush=True); time.sleep(60)"
    )
    log = tmp_path / "log"
    launcher = subprocess.Popen([sys.executable, "-c", script, str(log)], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    server = int(launcher.stdout.readline())
    try:
        bench.wait_for(lambda: log.read_text() == "1\n")
        launcher.kill()
        launcher.wait()
        bench.wait_for(lambda: not runs(server))
    finally:
        launcher.stdout.close()
        if runs(server):
            os.kill(server, signal.SIGKILL)


def test_a_launcher_that_died_too_early_starts_nothing(tmp_path: Path) -> None:
    """Dead before the tie was made: the child sees another parent than the one it was told."""
    child = [sys.executable, "-I", str(Path(process.__file__).with_name("child.py")), "1", "5", "/bin/echo", "started"]
    result = subprocess.run(child, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""


def test_a_disk_that_fills_up_ends_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def full(path: Path, text: str) -> None:
        written.append(text)
        if len(written) > 1:
            raise cannot_write(path, OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr("step128_launcher.supervisor.state_files.write_atomically", full)
    handler = signal.getsignal(signal.SIGTERM)
    assert bench.run(signals=(signal.SIGTERM,)) is ExitCode.OK
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "warning: " in bench.text() and "No space left on device" in bench.text()
    bench.assert_nothing_left()


def test_progress_that_nobody_can_see_ends_nothing(bench: Bench) -> None:
    with Path("/dev/full").open("w") as nowhere:
        bench.output.close()
        bench.output = nowhere
        assert bench.run(signals=(signal.SIGTERM,)) is ExitCode.OK
        bench.assert_nothing_left()
        with contextlib.suppress(OSError):
            nowhere.close()


def test_sigint_during_the_start_ends_it(bench: Bench) -> None:
    threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert bench.run("never") is ExitCode.OK
    bench.assert_nothing_left()


def test_a_second_signal_kills_at_once(bench: Bench) -> None:
    started = time.monotonic()
    server = replace(bench.job.server, shutdown_timeout_seconds=60)
    assert bench.run("stubborn", signals=(signal.SIGINT, signal.SIGINT), server=server) is ExitCode.OK
    assert time.monotonic() - started < 10 and "killed at once" in bench.text()
    bench.assert_nothing_left()


def test_a_server_that_ignores_sigterm_is_killed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step128_launcher.supervisor.attempt._EXIT_GRACE_SECONDS", 0.0)
    assert bench.run("stubborn", signals=(signal.SIGTERM,)) is ExitCode.OK
    assert "did not end within 1 s: killed" in bench.text()
    bench.assert_nothing_left()


def test_shared_memory_of_killed_processes_is_removed(tmp_path: Path) -> None:
    """A child killed in the middle leaves its segment to Python's resource tracker, which must get to remove it."""
    script = (
        "import time; from multiprocessing.shared_memory import SharedMemory; "
        "segment = SharedMemory(create=True, size=64); print(segment.name, flush=True); time.sleep(60)"
    )
    log = tmp_path / "log"
    group = ProcessGroup([sys.executable, "-c", script], os.environ, log, 5.0)
    deadline = time.monotonic() + 10
    while not log.read_text().endswith("\n") and time.monotonic() < deadline:
        time.sleep(0.02)
    segment = Path("/dev/shm") / log.read_text().strip()
    assert segment.exists()
    group.kill()
    assert not segment.exists() and group.exit_status() == -signal.SIGKILL


def test_a_launcher_killed_while_vllm_loads_takes_it_along(tmp_path: Path) -> None:
    """The server ignores SIGTERM, as vLLM does until it has loaded, and so does the child that it has."""
    script = (
        "import os, sys, time; from pathlib import Path; from step128_launcher.supervisor.process import ProcessGroup; "
        "child = 'import os, signal, time; signal.signal(15, signal.SIG_IGN); pid = os.fork(); "
        "print(os.getpid(), flush=True); time.sleep(60)'; "
        "ProcessGroup([sys.executable, '-S', '-c', child], os.environ, Path(sys.argv[1]), 0.3); time.sleep(60)"
    )
    log = tmp_path / "log"
    launcher = subprocess.Popen([sys.executable, "-c", script, str(log)])
    pids: list[int] = []
    try:
        wait_for(lambda: log.exists() and log.read_text().count("\n") == 2)
        pids = [int(line) for line in log.read_text().split()]
        assert all(runs(pid) for pid in pids)
        launcher.kill()
        launcher.wait()
        wait_for(lambda: not any(runs(pid) for pid in pids), seconds=5.0)
        wait_for(lambda: not group_members(min(pids)), seconds=8.0)  # nor is the watcher left
    finally:
        launcher.kill()
        for pid in pids:
            if runs(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_stream_is_finished_on_sigterm(bench: Bench) -> None:
    received: list[str] = []

    def read_then_end() -> None:
        bench.wait_for(lambda: bench.status.snapshot().state is State.READY)
        with urllib.request.urlopen(f"{bench.job.server.base_url}/stream") as stream:
            received.append(stream.readline().decode())
            os.kill(os.getpid(), signal.SIGTERM)
            received.extend(line.decode() for line in stream)

    reader = threading.Thread(target=read_then_end, daemon=True)
    reader.start()
    assert bench.run("stream") is ExitCode.OK
    reader.join(timeout=5)
    assert received == [f"data: {number}\n" for number in range(10)]
    bench.assert_nothing_left()


def test_the_log_is_cut_while_it_is_written_to(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time; print('a' * 1000, flush=True); go = pathlib.Path(sys.argv[1])\n"
        "while not go.exists(): time.sleep(0.02)\n"
        "print('after', flush=True)"
    )
    log, go = tmp_path / "vllm.log", tmp_path / "go"
    group = ProcessGroup([sys.executable, "-S", "-c", script, str(go)], os.environ, log, 1.0)
    try:
        wait_for(lambda: log.stat().st_size == 1001)
        assert not cap_log(log, 1001) and cap_log(log, 1000)
        go.touch()
        assert group.wait(10)
    finally:
        group.kill()
    assert log.read_text() == "after\n"  # and no hole of zeros before it
    old = tmp_path / "vllm.log.old"
    assert old.read_text() == "a" * 1000 + "\n" and old.stat().st_mode & 0o077 == 0
    assert not list(tmp_path.glob("*.partial"))


def test_logs_of_earlier_starts_move_up_and_the_oldest_goes(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    for number in range(5):
        log.write_text(f"{number}")
        keep_earlier_logs(log, 3)
    assert not log.exists()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "vllm.log.1": "4",
        "vllm.log.2": "3",
        "vllm.log.3": "2",
    }
