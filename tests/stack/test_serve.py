"""One server for these tests, started by the launcher as a user would, and asked through its HTTP interface."""

import json
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launched import Server, alive, descendants, launch


@pytest.fixture(scope="module")
def server(quantized: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with launch(quantized("all"), tmp_path_factory.mktemp("serve")) as running:
        yield running


@pytest.mark.serve
def test_what_was_planned_took_effect(server: Server) -> None:
    checks = server.checks()
    assert len(checks) >= 12
    assert all(line.startswith("PASS") for line in checks), checks
    for name in ("plugin_loaded", "quantization", "kv_scales", "kv_scales_mtp", "mtp", "quantized_components"):
        assert any(line.startswith(f"PASS {name}:") for line in checks)


@pytest.mark.serve
def test_only_this_machine_and_only_with_the_key(server: Server) -> None:
    port = int(server.url.rpartition(":")[2])
    listening = {
        line.split()[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        if Path(table).exists()
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].rpartition(":")[2], 16) == port
    }
    assert listening == {f"0100007F:{port:04X}"}  # 127.0.0.1, little-endian
    assert server.get(f"{server.url}/v1/models")[0] == 401
    assert server.get(f"{server.url}/v1/models", key=server.key)[0] == 200
    body = b'{"model": "any", "prompt": "x", "max_tokens": 1}'
    for path in ("/tokenize", "/v1/completions"):  # vLLM itself guards only the last of these
        assert server.get(f"{server.url}{path}", body)[0] == 401
    assert server.get(f"{server.url}/invocations", body, key=server.key)[0] == 404
    assert server.get(f"{server.url}/metrics")[0] == 401
    assert server.get(f"{server.url}/docs", key=server.key)[0] == 404
    assert (server.state / "api_key").stat().st_mode & 0o077 == 0
    assert server.key not in Path(f"/proc/{server.process.pid}/cmdline").read_text()
    for pid in descendants(server.process.pid):
        assert server.key not in Path(f"/proc/{pid}/cmdline").read_text()


@pytest.mark.serve
def test_question_image_and_tool_call(
    server: Server, cli: Callable[..., subprocess.CompletedProcess[str]], measured: Callable[[str], None]
) -> None:
    options = ("--base-url", server.url, "--api-key-file", server.state / "api_key", "--vision-plumbing-only")
    result = cli("step128-eval", "smoke", *options, "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    measured(f"question, image and tool call passed; acceptance over them: {json.dumps(report['acceptance'])}")


@pytest.mark.serve
def test_metrics_of_the_plan_and_of_vllm(server: Server) -> None:
    status, plan = server.get(server.metrics_url)
    assert status == 200
    assert 'step128_server_state{state="ready"} 1.0' in plan
    assert "step128_plan_max_model_len_tokens 16384.0" in plan
    assert 'step128_verification{check="kv_scales_mtp"} 1.0' in plan
    status, vllm = server.get(f"{server.url}/metrics", key=server.key)
    assert status == 200
    assert "vllm:spec_decode_num_accepted_tokens_per_pos_total" in vllm


@pytest.mark.serve
def test_second_server_on_the_same_port_is_refused(
    server: Server, cli: Callable[..., subprocess.CompletedProcess[str]], quantized: Callable[..., Path], tmp_path: Path
) -> None:
    port = server.url.rpartition(":")[2]
    options = ("--profile", "cpu", "--state-dir", tmp_path / "state", "--metrics-port", "0", "--port", port)
    result = cli("step128", "serve", quantized(), *options)
    assert result.returncode == 75, result.stderr
    assert server.get(f"{server.url}/health")[0] == 200


@pytest.mark.serve
def test_sigterm_ends_it_cleanly(server: Server) -> None:  # the last one: it ends the module's server
    children = descendants(server.process.pid)
    assert len(children) >= 2
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 0, server.log.read_text()
    assert not alive(children)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=2)
    assert json.loads((server.state / "status.json").read_text())["state"] == "stopped"
