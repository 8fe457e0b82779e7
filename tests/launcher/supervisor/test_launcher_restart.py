"""A server that dies while it serves is started again, after growing pauses and not for ever."""

import os
import signal
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from step128_launcher.errors import ExitCode
from step128_launcher.supervisor.job import Patience
from step128_launcher.supervisor.restarts import RestartPolicy
from step128_launcher.supervisor.status import State

Bench = Any  # the class of the fixture `bench`; a test cannot import conftest.py
QUICK = Patience(max_restarts=2, first_pause_seconds=0.05)


def test_pauses_double_up_to_a_minute_and_end_at_the_limit() -> None:
    policy = RestartPolicy(Patience(max_restarts=8))
    pauses = [policy.failed(0.0) for _ in range(9)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, None]


def test_ten_minutes_of_health_forgive_all_before() -> None:
    policy = RestartPolicy(Patience())
    assert [policy.failed(599.9) for _ in range(5)] == [1, 2, 4, 8, 16]
    assert policy.failed(600.0) == 1 and policy.failures == 1
    assert [policy.failed(0.0) for _ in range(5)] == [2, 4, 8, 16, None]


def test_a_killed_server_is_restarted_and_serves_again(bench: Bench) -> None:
    bench.patience = QUICK
    assert bench.run("killed_later", "ok", signals=(signal.SIGTERM,), starts=2) is ExitCode.OK
    snapshot = bench.status.snapshot()
    assert snapshot.state is State.STOPPED and snapshot.restarts == {"killed": 1}
    text = bench.text()
    assert "died while serving (signal 9)" in text and "Restart 1 of at most 2 in 0.05 s." in text
    assert text.count("Ready: ") == 2
    bench.assert_nothing_left()


def test_a_crash_loop_ends_at_the_limit(bench: Bench) -> None:
    bench.patience = QUICK
    error = bench.fail("die_later")
    assert error.exit_code == ExitCode.SERVER_FAILED and bench.starts() == 3
    assert "restarted 2 times without 600 s of health" in error.message
    assert "broken in mid-flight" in error.message
    assert bench.status.snapshot().restarts == {"crash": 2}
    assert bench.text().count("broken in mid-flight") == 2  # the cause, each time


def test_a_restart_that_fails_before_it_is_ready_counts_too(bench: Bench) -> None:
    bench.patience = QUICK
    error = bench.fail("die_later", "die", "memory")
    assert error.exit_code == ExitCode.SERVER_FAILED and bench.starts() == 3
    # That plan was ready once, so it fits: what it lacked at the restart was memory not yet given back.
    assert bench.status.snapshot().restarts == {"crash": 2} and bench.status.snapshot().step_downs == 0


def test_a_crash_before_the_first_ready_is_not_restarted(bench: Bench) -> None:
    bench.patience = QUICK
    assert bench.fail("die", "ok").exit_code == ExitCode.SERVER_FAILED
    assert bench.starts() == 1


@pytest.mark.parametrize(("mode", "code"), [("refuse", ExitCode.BAD_CHECKPOINT), ("late_port", ExitCode.PORT_IN_USE)])
def test_what_a_restart_cannot_cure_ends_it(mode: str, code: ExitCode, bench: Bench) -> None:
    bench.patience = QUICK
    assert bench.fail("die_later", mode, "ok").exit_code == code
    assert bench.starts() == 2


def test_sigterm_during_the_pause_ends_it_at_once(bench: Bench) -> None:
    bench.patience = replace(QUICK, first_pause_seconds=30.0)

    def end() -> None:
        bench.wait_for(lambda: bench.status.snapshot().state is State.RESTARTING)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    started = time.monotonic()
    assert bench.run("die_later", "ok") is ExitCode.OK
    assert time.monotonic() - started < 10 and bench.starts() == 1
    assert bench.status.snapshot().state is State.STOPPED
    bench.assert_nothing_left()
