"""The supervisor against a scripted server: start, verify, drain, die, and leave nothing behind."""

import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from step128_launcher.checkpoint import ModelFootprint
from step128_launcher.command import Server, server_environment
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.exporter import Exporter
from step128_launcher.hardware import Hardware
from step128_launcher.plan import Limits
from step128_launcher.planner import make_plan
from step128_launcher.process import ProcessGroup
from step128_launcher.profiles import Profile
from step128_launcher.progress import Progress
from step128_launcher.serve import Job, Supervisor
from step128_launcher.status import ServerStatus, State

FAKE = Path(__file__).with_name("fake_vllm.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Bench:
    """One job over the scripted server, and what became of its processes."""

    def __init__(self, job: Job, spec: dict[str, Any], tmp_path: Path) -> None:
        self.job, self.spec, self.status = job, spec, ServerStatus()
        self.spec_file = tmp_path / "spec.json"
        self.output = (tmp_path / "progress.txt").open("w+")

    def run(self, mode: str = "ok", signals: tuple[int, ...] = (), **changes: Any) -> ExitCode:
        self.spec_file.write_text(json.dumps(self.spec | {"mode": mode}))
        job = replace(self.job, **changes)
        supervisor = Supervisor(job, self.status, Progress(Console(file=self.output, width=200)))
        if signals:
            threading.Thread(target=self._signal_when_ready, args=(signals,), daemon=True).start()
        return supervisor.run()

    def _signal_when_ready(self, signals: tuple[int, ...]) -> None:
        deadline = time.monotonic() + 20
        while self.status.snapshot().state is not State.READY and time.monotonic() < deadline:
            time.sleep(0.05)
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    def fail(self, mode: str, **changes: Any) -> LauncherError:
        with pytest.raises(LauncherError) as caught:
            self.run(mode, **changes)
        assert self.status.snapshot().state is State.FAILED
        self.assert_nothing_left()
        return caught.value

    def assert_nothing_left(self) -> None:
        child = Path(self.spec["child_file"])
        if child.exists():
            assert not Path(f"/proc/{child.read_text()}").exists()
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", self.job.server.port)) != 0

    def text(self) -> str:
        self.output.flush()
        return Path(self.output.name).read_text()


@pytest.fixture
def bench(
    footprint: ModelFootprint, cpu_profile: Profile, make_machine: Callable[..., Hardware], tmp_path: Path
) -> Bench:
    plan = make_plan(make_machine(cpus=2), footprint, cpu_profile, Limits())
    state = tmp_path / "state"
    server = Server(footprint.path, "tiny", "127.0.0.1", free_port(), state / "load-reports", 1)
    argv = (sys.executable, str(FAKE), str(tmp_path / "spec.json"))
    environment = server_environment(os.environ, plan, server, "k")
    job = Job(plan, footprint, server, "k", argv, environment, state, start_timeout_seconds=20.0)
    scales = {str(layer): {"k": pair.k, "v": pair.v} for layer, pair in (footprint.kv_scales or {}).items()}
    parts = footprint.components
    labels = {
        "cache_dtype": "fp8",
        "num_gpu_blocks": plan.prediction.num_gpu_blocks,
        "kv_cache_size_tokens": plan.prediction.kv_cache_size_tokens,
    }
    text = ",".join(f'{name}="{value}"' for name, value in labels.items())
    report = {
        "schema": 1,
        "plugin_version": "0.1.0",
        "rank": 0,
        "quant_method": "nl4",
        "policy": "all-linears",
        "weight_path": "torch",
        "kv_cache_dtype": "fp8",
        "kv_scales": scales,
        "load_seconds": 1.0,
    }
    spec = {
        "port": server.port,
        "child_file": str(tmp_path / "child"),
        "metrics": f"# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{{{text}}} 1.0\n",
        "model": {"id": "tiny", "max_model_len": plan.max_model_len},
        "reports": {
            f"{role}-rank0.json": report
            | {
                "role": role,
                "quantized_modules": {
                    part.name: 2 for part in parts if part.quantized and part.draft == (role == "draft")
                },
            }
            for role in ("target", "draft")
        },
    }
    return Bench(job, spec, tmp_path)


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
    error = bench.fail("oom")
    assert error.exit_code == ExitCode.SERVER_FAILED and "ran out of memory" in error.message


def test_port_lost_while_loading(bench: Bench) -> None:
    assert bench.fail("late_port").exit_code == ExitCode.PORT_IN_USE


def test_death_while_serving(bench: Bench) -> None:
    error = bench.fail("die_later")
    assert error.exit_code == ExitCode.SERVER_FAILED
    assert "died while serving" in error.message and "broken in mid-flight" in error.message


def test_start_timeout(bench: Bench) -> None:
    error = bench.fail("never", start_timeout_seconds=0.5)
    assert error.exit_code == ExitCode.SERVER_FAILED and "not ready within" in error.message


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


def test_metrics_show_plan_state_and_verification(bench: Bench) -> None:
    port = free_port()
    exporter = Exporter(bench.job.plan, bench.status, "127.0.0.1", port)
    try:
        bench.run(signals=(signal.SIGTERM,))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            text = response.read().decode()
        with pytest.raises(LauncherError, match="metrics port") as caught:
            Exporter(bench.job.plan, bench.status, "127.0.0.1", port)
        assert caught.value.exit_code == ExitCode.PORT_IN_USE
    finally:
        exporter.close()
    for line in (
        "step128_plan_max_model_len_tokens 4096.0",
        'step128_plan_info{dtype="bfloat16",kv_cache_dtype="fp8",profile="cpu"} 1.0',
        'step128_server_state{state="stopped"} 1.0',
        'step128_server_state{state="ready"} 0.0',
        'step128_verification{check="kv_scales"} 1.0',
        "step128_server_start_seconds ",
        'step128_plan_memory_bytes{evidence="vLLM\'s code",item="KV cache"} ',
    ):
        assert line in text
