"""A supervisor over the scripted server of fake_vllm.py."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from step128_launcher.command import Server, server_environment
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.planning.plan import Limits, Plan
from step128_launcher.planning.planner import make_plan
from step128_launcher.planning.profiles import Profile
from step128_launcher.supervisor.job import Job, Patience
from step128_launcher.supervisor.progress import Progress
from step128_launcher.supervisor.serve import Supervisor
from step128_launcher.supervisor.signals import StopSignals
from step128_launcher.supervisor.status import ServerStatus, State

FAKE = Path(__file__).parents[1] / "fake_vllm.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def accepted_per_position(depth: int) -> str:
    """vLLM's counters of accepted drafts: there from the start, one for each position."""
    name = "vllm:spec_decode_num_accepted_tokens_per_pos"
    lines = [f'{name}_total{{engine="0",position="{position}"}} 0.0\n' for position in range(depth)]
    return "".join([f"# TYPE {name} counter\n", *lines]) if depth else ""


class Bench:
    """One job over the scripted server, and what became of its processes."""

    free_port = staticmethod(free_port)
    wait_for = staticmethod(wait_for)

    def __init__(self, job: Job, spec: dict[str, Any], tmp_path: Path) -> None:
        self.job, self.spec, self.status = job, spec, ServerStatus()
        self.plan = job.plan
        self.stop: StopSignals | None = None  # entered, of a test that has its own
        self.patience = Patience(max_restarts=0, first_pause_seconds=0.05)
        self.spec_file = tmp_path / "spec.json"
        self.output = (tmp_path / "progress.txt").open("w+")

    def run(self, *modes: str, signals: tuple[int, ...] = (), starts: int = 1, **changes: Any) -> ExitCode:
        """Serve with one mode a start, and send `signals` when the start number `starts` is ready."""
        self.spec_file.write_text(json.dumps(self.spec | {"modes": modes or ["ok"]}))

        def make_job(plan: Plan) -> Job:
            argv = (*self.job.argv, str(plan.max_model_len))
            return replace(self.job, **({"plan": plan, "argv": argv} | changes))

        progress = Progress(Console(file=self.output, width=200))
        with contextlib.ExitStack() as stack:
            stop = self.stop or stack.enter_context(StopSignals())
            supervisor = Supervisor(make_job, self.plan, self.status, progress, stop, self.patience)
            if signals:
                threading.Thread(target=self._signal_when_ready, args=(signals, starts), daemon=True).start()
            return supervisor.run()

    def when(self, condition: Callable[[], bool], number: int) -> None:
        """Send this process a signal as soon as the condition holds."""

        def wait() -> None:
            wait_for(condition)
            os.kill(os.getpid(), number)

        threading.Thread(target=wait, daemon=True).start()

    def starts(self) -> int:
        return int(Path(self.spec["starts_file"]).read_text())

    def leaner(self, *context: int) -> None:
        """Give the plan fallbacks of these context lengths."""
        fallbacks = tuple(replace(self.plan, max_model_len=length) for length in context)
        self.plan = replace(self.plan, fallbacks=fallbacks)

    def _signal_when_ready(self, signals: tuple[int, ...], starts: int) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            ready = self.status.snapshot().state is State.READY
            if ready and self.starts() >= starts:
                break
            time.sleep(0.02)
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    def fail(self, *modes: str, **changes: Any) -> LauncherError:
        with pytest.raises(LauncherError) as caught:
            self.run(*modes, **changes)
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
    argv = (sys.executable, "-S", str(FAKE), str(tmp_path / "spec.json"))
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
        "starts_file": str(tmp_path / "starts"),
        "metrics": f"# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{{{text}}} 1.0\n"
        + accepted_per_position(plan.num_speculative_tokens),
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
