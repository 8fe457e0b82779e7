"""`step128 status`: what the state folder says, and what is true now."""

import argparse
import fcntl
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.commands.status_command import read_status, run_status
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.supervisor.lock import hold_lock, is_held
from step128_launcher.supervisor.status import State

Bench = Any  # the class of the fixture `bench`; a test cannot import conftest.py


def options(json: bool) -> argparse.Namespace:
    return argparse.Namespace(json=json)


def test_a_server_that_serves(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[ExitCode] = []

    def look() -> bool:
        if bench.status.snapshot().state is not State.READY:
            return False
        bench.wait_for(lambda: json.loads((bench.job.state_dir / "status.json").read_text())["state"] == "ready")
        codes.append(run_status(options(json=False), bench.job.state_dir))
        return True

    bench.when(look, 15)
    bench.job.state_dir.mkdir(exist_ok=True)
    with hold_lock(bench.job.state_dir):
        bench.run()
    assert codes == [ExitCode.OK]
    text = capsys.readouterr().out
    assert "State     ready; /health answers" in text and "model tiny, context 4096" in text
    assert f"Launcher  process {os.getpid()}, running" in text
    assert run_status(options(json=True), bench.job.state_dir) is ExitCode.SERVER_FAILED
    document = json.loads(capsys.readouterr().out)
    assert document["state"] == "stopped" and document["answers"] is False and document["failure"] is None


def test_a_failure_is_told_with_its_reason(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.fail("refuse")
    run_status(options(json=False), bench.job.state_dir)
    text = capsys.readouterr().out
    assert "State     failed" in text and "missing tensor lm_head.x" in text and "(exit code 65)" in text


def put(state_dir: Path, state: str, written: float, locked: float | None = None) -> None:
    """Leave the files of a run; the process id is one that lives, as ids that are used again do."""
    document = {"state": state, "base_url": "http://127.0.0.1:9", "launcher_pid": os.getpid(), "failure": None}
    (state_dir / "status.json").write_text(json.dumps(document))
    os.utime(state_dir / "status.json", (written, written))
    if locked is not None:
        (state_dir / "lock").touch()
        os.utime(state_dir / "lock", (locked, locked))


@pytest.mark.parametrize(("state", "now"), [("ready", "gone"), ("starting", "gone"), ("stopped", "stopped")])
def test_a_launcher_without_the_lock_is_gone_whoever_has_its_pid(
    state: str, now: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = time.time() - 600
    put(tmp_path, state, written, locked=written - 1)
    status = read_status(tmp_path)
    assert status["state"] == now and not status["launcher_alive"] and not status["answers"]
    assert run_status(options(json=False), tmp_path) is ExitCode.SERVER_FAILED
    text = capsys.readouterr().out
    assert "Written   10 minutes ago" in text and "Launcher  not running" in text
    assert (f"ago: {state}, but its launcher is gone" in text) is (now == "gone")


def test_a_file_of_an_earlier_run_is_not_the_later_launcher_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "ready", time.time() - 3 * 86400)
    with hold_lock(tmp_path):
        status = read_status(tmp_path)
        assert status["state"] == "preparing" and status["launcher_alive"] and not status["answers"]
        run_status(options(json=False), tmp_path)
    text = capsys.readouterr().out
    assert "3 days ago by an earlier run, which was ready; a later launcher has written none yet" in text
    assert read_status(tmp_path)["state"] == "gone"
    run_status(options(json=False), tmp_path)
    assert "a later launcher ended before it wrote one" in capsys.readouterr().out


def test_looking_takes_the_lock_from_nobody(tmp_path: Path) -> None:
    assert not is_held(tmp_path) and not (tmp_path / "lock").exists()
    descriptor = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # one who looks at this moment
    threading.Timer(0.08, os.close, (descriptor,)).start()
    with hold_lock(tmp_path):
        assert is_held(tmp_path)
        with pytest.raises(LauncherError) as caught, hold_lock(tmp_path):
            pass
        assert caught.value.exit_code is ExitCode.PORT_IN_USE and is_held(tmp_path)
    assert not is_held(tmp_path)


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, ExitCode.INPUT_NOT_FOUND), ("{", ExitCode.BAD_CHECKPOINT), ("[]", ExitCode.BAD_CHECKPOINT)],
)
def test_no_status(content: str | None, code: ExitCode, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "status.json").write_text(content)
    with pytest.raises(LauncherError) as caught:
        read_status(tmp_path)
    assert caught.value.exit_code == code
