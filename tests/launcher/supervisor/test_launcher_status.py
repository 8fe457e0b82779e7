"""`step128 status`: what the state folder says, and what is true now."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.commands.status_command import read_status, run_status
from step128_launcher.errors import ExitCode, LauncherError
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


def test_a_killed_launcher_is_gone_whatever_it_wrote(bench: Bench) -> None:
    bench.run(signals=(15,))
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    path = bench.job.state_dir / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "ready", "launcher_pid": ended.pid}))
    status = read_status(bench.job.state_dir)
    assert status["state"] == "gone" and not status["launcher_alive"] and not status["answers"]


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
