"""Why a server ended, told from its log and its end; what may be told to anyone."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.supervisor.exporter import health_document
from step128_launcher.supervisor.job import Patience
from step128_launcher.supervisor.loading import shard_sizes
from step128_launcher.supervisor.status import ServerStatus, State

Bench = Any  # the class of the fixture `bench`; a test cannot import conftest.py


def service(**changes: Any) -> Patience:
    return replace(Patience(max_restarts=1, first_pause_seconds=0.05, service=True), **changes)


def test_the_engine_s_process_killed(bench: Bench) -> None:
    error = bench.fail("core_killed")
    assert error.exit_code == ExitCode.SERVER_FAILED and "Killed from outside" in error.message


def test_the_engine_s_process_killed_by_the_kernel_for_memory(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "root/proc").mkdir(parents=True)
    vmstat = tmp_path / "root/proc/vmstat"
    vmstat.write_text("oom_kill 7\n")
    bench.leaner(2048)
    bench.patience = Patience(root=tmp_path / "root")
    text = "Engine core initialization failed. Failed core proc(s): {'EngineCore': -9}"
    script = f"from pathlib import Path; Path({str(vmstat)!r}).write_text('oom_kill 8'); raise RuntimeError({text!r})"
    bench.fail("ok", argv=(bench.job.argv[0], "-S", "-c", script))
    assert bench.status.snapshot().step_downs == 1 and "The kernel killed it" in bench.text()


def test_one_answer_cut_short_wastes_no_load(bench: Bench) -> None:
    assert bench.run("cut_metrics", signals=(signal.SIGTERM,)) is ExitCode.OK
    assert "Ready: " in bench.text()


def test_dying_while_verified_is_a_crash_with_its_cause(bench: Bench) -> None:
    error = bench.fail("die_verified")
    assert error.exit_code == ExitCode.SERVER_FAILED
    assert "died while it was being verified" in error.message and "broken while verified" in error.message


def test_answers_that_stay_unreadable_are_a_crash(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step128_launcher.supervisor.observing._RETRY_SECONDS", 0.0)
    error = bench.fail("cut_metrics")
    assert error.exit_code == ExitCode.SERVER_FAILED and "IncompleteRead" in error.message


@pytest.mark.parametrize("mode", ["other_port", "memory_before"])
def test_a_crash_that_only_looks_like_something_else(mode: str, bench: Bench) -> None:
    assert bench.fail(mode).exit_code == ExitCode.SERVER_FAILED
    assert bench.starts() == 1


def test_by_hand_the_own_port_taken_is_75(bench: Bench) -> None:
    assert bench.fail("late_port").exit_code == ExitCode.PORT_IN_USE


@pytest.mark.parametrize("mode", ["die", "killed", "late_port"])
def test_a_service_is_restarted_before_it_was_ready(mode: str, bench: Bench) -> None:
    bench.patience = service()
    assert bench.run(mode, "ok", signals=(signal.SIGTERM,), starts=2) is ExitCode.OK
    assert bench.starts() == 2


def test_a_service_is_not_restarted_for_ever(bench: Bench) -> None:
    bench.patience = service()
    error = bench.fail("die")
    assert bench.starts() == 2 and "the real cause" in error.message and "the real cause" not in error.public


@pytest.mark.parametrize("mode", ["die", "memory", "refuse", "killed", "die_later"])
def test_what_anyone_may_read_quotes_no_log(mode: str, bench: Bench) -> None:
    error = bench.fail(mode)
    document = json.dumps(health_document(bench.status.snapshot()))
    for line in bench.job.log.read_text().splitlines():
        assert line.rpartition("] ")[2] not in document
    assert str(bench.job.log) in document and error.public in json.loads(document)["reason"]


def test_why_it_is_restarted_is_told_until_it_is_ready() -> None:
    status = ServerStatus()
    status.enter(State.STARTING)
    status.enter(State.READY)
    assert status.snapshot().start_seconds is not None
    status.restarted("crash", LauncherError(ExitCode.SERVER_FAILED, "a prompt", "See the log.", "vLLM died."))
    status.enter(State.RESTARTING)
    assert status.snapshot().start_seconds is None
    assert health_document(status.snapshot()) == {"state": "restarting", "reason": "vLLM died.", "hint": "See the log."}
    status.enter(State.READY)
    assert health_document(status.snapshot()) == {"state": "ready"}


def test_a_folder_of_shards_that_went_away(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "nowhere")
    assert shard_sizes(tmp_path) == ()
