"""The supervisor against a scripted server: start, verify, watch, and what failures look like."""

import json
import os
import signal
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.supervisor.exporter import Exporter
from step128_launcher.supervisor.health import HealthWatch
from step128_launcher.supervisor.status import ServerStatus, State

Bench = Any  # the class of the fixture `bench`; a test cannot import conftest.py


def test_serves_verifies_and_ends_cleanly_on_sigterm(bench: Bench) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    assert bench.run(signals=(signal.SIGTERM,)) is ExitCode.OK
    assert signal.getsignal(signal.SIGTERM) is handler
    snapshot = bench.status.snapshot()
    assert snapshot.state is State.STOPPED and snapshot.start_seconds is not None
    assert {check.outcome.value for check in snapshot.checks} == {"PASS"}
    assert json.loads((bench.job.state_dir / "status.json").read_text())["state"] == "stopped"
    text = bench.text()
    assert "starting the engine" in text and "Ready: http://127.0.0.1" in text and "stopping" in text
    bench.assert_nothing_left()


def test_the_log_of_the_run_before_is_kept(bench: Bench) -> None:
    bench.job.state_dir.mkdir()
    bench.job.log.write_text("the run before")
    bench.fail("die")
    assert bench.job.log.with_name("vllm.log.1").read_text() == "the run before"
    assert "the real cause" in bench.job.log.read_text()


def test_a_server_that_stops_answering_is_reported(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step128_launcher.supervisor.health.PROBE_SECONDS", 0.05)
    seen: list[bool] = []

    def stop_when_reported() -> None:
        bench.wait_for(lambda: bench.status.snapshot().state is State.READY)
        bench.wait_for(lambda: "/health failed" in bench.text())
        seen.append(bench.status.snapshot().healthy)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_reported, daemon=True).start()
    assert bench.run("sick") is ExitCode.OK
    assert seen == [False] and bench.text().count("/health failed") == 1


def test_health_that_comes_back_is_reported_once() -> None:
    status = ServerStatus()
    status.enter(State.READY)
    client: Any = None
    watch = HealthWatch(client, status)
    assert status.snapshot().healthy and watch.news() is None
    for healthy, news in (
        (False, None),
        (False, None),
        (False, "3 times"),
        (False, None),
        (True, "again"),
        (True, None),
    ):
        status.probed(healthy)
        found = watch.news()
        assert news in found if found and news else found is news, (healthy, news)
        assert status.snapshot().healthy is healthy


def test_death_at_the_start_shows_the_real_cause(bench: Bench) -> None:
    error = bench.fail("die")
    assert error.exit_code == ExitCode.SERVER_FAILED
    assert "AssertionError: the real cause" in error.message and "exit status 1" in error.message
    assert "vllm.log" in error.hint


def test_the_plugins_complaint_is_a_bad_checkpoint(bench: Bench) -> None:
    error = bench.fail("refuse")
    assert error.exit_code == ExitCode.BAD_CHECKPOINT
    assert "missing tensor lm_head.x" in error.message


def test_killed_from_outside_hints_at_memory(bench: Bench) -> None:
    error = bench.fail("killed")
    assert error.exit_code == ExitCode.SERVER_FAILED and "ran out of memory" in error.message


def test_port_lost_while_loading(bench: Bench) -> None:
    assert bench.fail("late_port").exit_code == ExitCode.PORT_IN_USE


def test_death_while_serving(bench: Bench) -> None:
    error = bench.fail("die_later")
    assert error.exit_code == ExitCode.SERVER_FAILED
    assert "died while serving" in error.message and "broken in mid-flight" in error.message


def test_the_start_s_lines_mean_nothing_later(bench: Bench) -> None:
    assert bench.fail("die_talking").exit_code == ExitCode.SERVER_FAILED


def test_port_in_use_is_found_before_anything_starts(bench: Bench) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", bench.job.server.port))
        taken.listen()
        with pytest.raises(LauncherError, match="in use") as caught:
            bench.run()
    assert caught.value.exit_code == ExitCode.PORT_IN_USE
    assert not Path(bench.spec["child_file"]).exists() and not bench.job.state_dir.exists()


def test_command_that_does_not_exist(bench: Bench) -> None:
    with pytest.raises(LauncherError, match="cannot be started") as caught:
        bench.run(argv=("/nonexistent/vllm",))
    assert caught.value.exit_code == ExitCode.SERVER_FAILED


def test_failed_verification_stops_the_server(bench: Bench) -> None:
    bench.spec["reports"]["target-rank0.json"]["kv_scales"]["2"]["k"] = 1.0
    error = bench.fail("ok")
    assert error.exit_code == ExitCode.VERIFICATION_FAILED
    assert "kv_scales: layer 2, target rank 0: k 1 v" in error.message
    assert "FAIL kv_scales" in bench.text()


def test_reports_of_an_earlier_run_do_not_count(bench: Bench) -> None:
    folder = bench.job.server.load_report_dir
    folder.mkdir(parents=True)
    (folder / "target-rank0.json").write_text(json.dumps(bench.spec["reports"].pop("target-rank0.json")))
    assert "plugin_loaded" in bench.fail("ok").message


def test_metrics_show_plan_state_and_verification(bench: Bench) -> None:
    port = bench.free_port()
    exporter = Exporter(bench.status, "127.0.0.1", port)
    try:
        bench.run(signals=(signal.SIGTERM,))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            text = response.read().decode()
        with pytest.raises(LauncherError, match="metrics port") as caught:
            Exporter(bench.status, "127.0.0.1", port)
        assert caught.value.exit_code == ExitCode.PORT_IN_USE
    finally:
        exporter.close()
    for line in (
        "step128_plan_max_model_len_tokens 4096.0",
        'step128_plan_info{dtype="bfloat16",kv_cache_dtype="fp8",profile="cpu"} 1.0',
        'step128_server_state{state="stopped"} 1.0',
        'step128_server_state{state="ready"} 0.0',
        'step128_verification{check="kv_scales"} 1.0',
        "step128_server_healthy 0.0",
        "step128_server_start_seconds ",
        'step128_plan_memory_bytes{evidence="vLLM\'s code",item="KV cache"} ',
    ):
        assert line in text
