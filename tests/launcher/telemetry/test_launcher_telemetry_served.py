"""Telemetry beside the launcher's own metrics, also while the server is held down."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

MACHINES = Path(__file__).parents[2] / "machines"


def test_a_service_that_cannot_start_still_tells_of_its_gpus(tmp_path: Path) -> None:
    """There is no model, so vLLM never runs; that is why there is no exporter of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "step128"), "serve", "--service", "--metrics-port", str(port)]
    environment = os.environ | {"STEP128_TELEMETRY_ROOT": str(MACHINES / "quad-r9700")}
    with subprocess.Popen(
        [*command, "--state-dir", str(tmp_path / "state"), str(tmp_path / "no-model")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            text = held_metrics(port)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    assert [sample.labels["exit_code"] for sample in samples["step128_server_failed"]] == ["66"]
    assert len(samples["step128_gpu_info"]) == 4 and len(samples["step128_gpu_power_watts"]) == 4
    assert samples["step128_exporter_collect_seconds"][0].value < 1


def held_metrics(port: int) -> str:
    """/metrics once the server is held."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text = str(answer.read().decode())
        except urllib.error.URLError:
            text = ""
        if "step128_server_failed{" in text:
            return text
        time.sleep(0.1)
    raise AssertionError("the server was not held")


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "step128"), "serve", str(tmp_path), "--metrics-port", "9"]
    environment = os.environ | {"STEP128_TELEMETRY_ROOT": str(tmp_path / "none")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 78 and "STEP128_TELEMETRY_ROOT" in result.stderr and "Traceback" not in result.stderr
