"""What happens to a real server: killed, told to end while it loads or streams, port taken, too little memory.

The launcher is started as a user would, with the real vLLM and the trained tiny checkpoint.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from launched import Server, alive, descendants, free_port, launch

from step128_launcher import cli, command
from step128_launcher.commands import serving
from step128_launcher.commands.planned import Planned, make_planned
from step128_launcher.errors import ExitCode
from step128_launcher.planning.plan import Plan

# vLLM's start on two busy cores.
START_SECONDS, END_SECONDS = 300.0, 60.0
LOADING = "Initializing a V1 LLM engine"


@dataclass
class Loading:
    """A launcher whose server is not ready yet."""

    process: subprocess.Popen[bytes]
    port: int
    state: Path
    output: Path

    def log(self) -> str:
        try:
            return (self.state / "vllm.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def state_name(self) -> str:
        return state_name(self.state)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for something that comes before the launcher's end."""
        wait_for(lambda: condition() or self.process.poll() is not None, START_SECONDS, self.output.read_text)
        assert self.process.poll() is None, self.output.read_text()


def state_name(folder: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return str(json.loads((folder / "status.json").read_text())["state"])
    return "not started"


def wait_for(condition: Callable[[], bool], seconds: float, what: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


@contextmanager
def start(model: Path, folder: Path) -> Iterator[Loading]:
    """Start `step128 serve` and go on at once; whatever is left of it at the end is killed."""
    port, output = free_port(), folder / "launcher.log"
    program = str(Path(sys.executable).parent / "step128")
    arguments = [program, "serve", str(model), "--profile", "cpu", "--state-dir", str(folder / "state")]
    with output.open("wb") as file:
        options = ["--port", str(port), "--metrics-port", "0"]
        process = subprocess.Popen([*arguments, *options], stdout=file, stderr=subprocess.STDOUT)
    started: set[int] = set()
    try:
        yield Loading(process, port, folder / "state", output)
        started = descendants(process.pid)
    finally:
        process.kill()
        process.wait()
        for pid in alive(started):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(quantized: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with launch(quantized(), tmp_path_factory.mktemp("faults")) as running:
        yield running


@pytest.mark.proof
def test_a_killed_worker_is_replaced_and_answers(server: Server, measured: Callable[[str], None]) -> None:
    log = server.state / "vllm.log"
    worker = re.search(r"\(Worker(?:_\w+)? pid=(\d+)\)", log.read_text())
    assert worker is not None
    before = descendants(server.process.pid)
    assert int(worker[1]) in before
    killed_at = time.monotonic()
    os.kill(int(worker[1]), signal.SIGKILL)
    wait_for(lambda: state_name(server.state) == "restarting", END_SECONDS, server.log.read_text)
    wait_for(lambda: state_name(server.state) == "ready", START_SECONDS, server.log.read_text)
    measured(f"killed worker: serving again after {time.monotonic() - killed_at:.0f} s")
    assert not alive(before - {server.process.pid}) & before
    body = json.dumps({"model": model_name(server), "prompt": "2+3=", "max_tokens": 4}).encode()
    status, answer = server.get(f"{server.url}/v1/completions", body, server.key)
    assert status == 200 and json.loads(answer)["usage"]["completion_tokens"] > 0
    metrics = server.get(server.metrics_url)[1]
    assert re.search(r'step128_server_restarts_total\{reason="\w+"\} 1\.0', metrics)
    text = server.log.read_text()
    assert "died while serving" in text and "Restart 1 of at most 5 in 1 s." in text
    assert log.with_name("vllm.log.1").exists()


@pytest.mark.proof
def test_plan_against_reality(server: Server) -> None:
    metrics = server.get(server.metrics_url)[1]
    for item in ("num_gpu_blocks", "kv_cache_size_tokens", "kv_cache_max_concurrency"):
        assert f"step128_plan_difference_{item} 0.0" in metrics, metrics
    assert 'step128_plan_difference_bytes{item="kv_cache"} 0.0' in metrics
    assert "Planned against measured" in server.log.read_text()
    assert re.search(r"loading weights: 100%, .* of .*, shard \d of \d", server.log.read_text())
    assert json.loads((server.state / "plan.json").read_text())["reality"]["num_gpu_blocks"] > 0


def model_name(server: Server) -> str:
    return str(json.loads((server.state / "status.json").read_text())["served_model_name"])


@pytest.mark.proof
def test_a_stream_is_finished_on_sigterm(server: Server) -> None:  # the last one: it ends the module's server
    children = descendants(server.process.pid)
    request = {"model": model_name(server), "prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"}
    url = f"{server.url}/v1/completions"
    lines: list[str] = []
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(request).encode(), headers)) as stream:
        lines.append(stream.readline().decode())
        server.process.send_signal(signal.SIGTERM)
        lines += [line.decode() for line in stream]
    events = [line.removeprefix("data: ").strip() for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(timeout=END_SECONDS) == 0, server.log.read_text()
    assert not alive(children) and state_name(server.state) == "stopped"


@pytest.mark.proof
def test_sigterm_while_it_loads(
    quantized: Callable[..., Path], tmp_path: Path, measured: Callable[[str], None]
) -> None:
    with start(quantized(), tmp_path) as loading:
        loading.wait_for(lambda: LOADING in loading.log())
        children = descendants(loading.process.pid)
        began = time.monotonic()
        loading.process.send_signal(signal.SIGTERM)
        assert loading.process.wait(timeout=END_SECONDS) == 0, loading.output.read_text()
        measured(f"SIGTERM while loading: gone after {time.monotonic() - began:.1f} s")
        assert time.monotonic() - began < 15
        assert len(children) >= 2 and not alive(children) and loading.state_name() == "stopped"


@pytest.mark.proof
def test_a_launcher_killed_while_vllm_loads_takes_it_along(quantized: Callable[..., Path], tmp_path: Path) -> None:
    with start(quantized(), tmp_path) as loading:
        loading.wait_for(lambda: LOADING in loading.log())
        children = descendants(loading.process.pid)
        loading.process.kill()
        loading.process.wait()
        try:
            wait_for(lambda: not alive(children), END_SECONDS, lambda: f"left: {alive(children)}")
        finally:
            for pid in alive(children):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.proof
def test_port_taken_while_it_loads(quantized: Callable[..., Path], tmp_path: Path) -> None:
    """Taken after the launcher looked, and before vLLM opens it."""
    with start(quantized(), tmp_path) as loading, socket.socket() as taken:
        loading.wait_for(lambda: loading.state_name() == "starting")
        taken.bind(("127.0.0.1", loading.port))
        taken.listen()
        assert loading.process.wait(timeout=START_SECONDS) == ExitCode.PORT_IN_USE, loading.output.read_text()
    text = loading.output.read_text()
    assert f"Port {loading.port} on 127.0.0.1 is in use" in text and "Traceback" not in text


@pytest.mark.proof
def test_too_little_memory_for_the_first_plan(
    quantized: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The first plan's cache is made too small for its context, so vLLM itself refuses; the next plan is as planned."""
    first: list[Plan] = []

    def with_fallback(options: argparse.Namespace, with_fallbacks: bool) -> Planned:
        planned = make_planned(options, with_fallbacks)
        leaner = replace(planned.plan, max_num_seqs=planned.plan.max_num_seqs // 2, fallbacks=())
        first.append(planned.plan)
        return replace(planned, plan=replace(planned.plan, fallbacks=(leaner,)))

    def too_small(plan: Plan, server: command.Server) -> tuple[str, ...]:
        argv = list(command.server_argv(plan, server))
        if plan.max_num_seqs == first[0].max_num_seqs:
            argv[argv.index("--kv-cache-memory-bytes") + 1] = str(plan.kv_cache_memory_bytes // 16)
        return tuple(argv)

    monkeypatch.setattr(serving, "make_planned", with_fallback)
    monkeypatch.setattr(serving, "server_argv", too_small)
    state = tmp_path / "state"

    def end_when_ready() -> None:
        deadline = time.monotonic() + 2 * START_SECONDS
        while state_name(state) not in ("ready", "failed") and time.monotonic() < deadline:
            time.sleep(0.1)
        if state_name(state) != "failed":
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_when_ready, daemon=True).start()
    arguments = ["serve", str(quantized()), "--profile", "cpu", "--state-dir", str(state), "--metrics-port", "0"]
    code = cli.main([*arguments, "--port", str(free_port())])
    text = capfd.readouterr().err
    assert code == 0, text
    assert "larger than the available KV cache memory" in text and "Stepping down, 0 more left" in text
    assert f"requests at once {first[0].max_num_seqs} -> {first[0].max_num_seqs // 2}" in text
    status = json.loads((state / "status.json").read_text())
    assert status["step_downs"] == 1 and status["state"] == "stopped"
    assert "larger than the available KV cache memory" in (state / "vllm.log.1").read_text()
