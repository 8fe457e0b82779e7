"""How a run ends: whatever happens to the launcher, vLLM is taken down and nothing is left."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_launcher import process
from step128_launcher.errors import ExitCode
from step128_launcher.files import cannot_write
from step128_launcher.process import ProcessGroup

Bench = Any  # the class of the fixture `bench`; a test cannot import conftest.py


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_other_ways_to_be_told_to_end(number: signal.Signals, bench: Bench) -> None:
    handler = signal.getsignal(number)
    assert bench.run(signals=(number,)) is ExitCode.OK
    assert signal.getsignal(number) is handler
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
        "import os, sys, time; from pathlib import Path; from step128_launcher.process import ProcessGroup; "
        "group = ProcessGroup([sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(60)'], "
        "os.environ, Path(sys.argv[1])); print(group.pid, flush=True); time.sleep(60)"
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
    child = [sys.executable, "-I", str(Path(process.__file__).with_name("child.py")), "1", "/bin/echo", "started"]
    result = subprocess.run(child, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""


def test_a_disk_that_fills_up_ends_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def full(path: Path, text: str) -> None:
        written.append(text)
        if len(written) > 1:
            raise cannot_write(path, OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr("step128_launcher.serve.write_atomically", full)
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
    monkeypatch.setattr("step128_launcher.serve._EXIT_GRACE_SECONDS", 0.0)
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
    group = ProcessGroup([sys.executable, "-c", script], os.environ, log)
    deadline = time.monotonic() + 10
    while not log.read_text().endswith("\n") and time.monotonic() < deadline:
        time.sleep(0.02)
    segment = Path("/dev/shm") / log.read_text().strip()
    assert segment.exists()
    group.kill()
    assert not segment.exists() and group.exit_status() == -signal.SIGKILL
