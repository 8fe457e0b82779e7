"""A real Prometheus over our rules in fast motion, the real exporter on a tree, and a vLLM of numbers only."""

import http.server
import json
import os
import re
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SPEED = 200
_SHORTEST_SECONDS = 4  # a rate needs two scrapes, a second apart
_DURATION = re.compile(r"(\[|offset |for: )(\d+)([mh])")
_LABELS = 'model_name="m",engine="0"'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def in_fast_motion(rules: str) -> str:
    """The rules with every range, offset and `for` SPEED times shorter, so that an alert of hours takes minutes."""

    def shorter(match: re.Match[str]) -> str:
        seconds = int(match[2]) * {"m": 60, "h": 3600}[match[3]]
        return f"{match[1]}{max(_SHORTEST_SECONDS, round(seconds / SPEED))}s"

    return _DURATION.sub(shorter, rules)


def write(path: Path, content: bytes | str | int) -> None:
    """Replace a file of a tree at once, as sysfs would never show half of one."""
    data = content if isinstance(content, bytes) else str(content).encode()
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    new.replace(path)


class NumbersOfVllm:
    """Serves vLLM's metrics to whoever has the token; each scrape adds `steps` to the counters."""

    def __init__(self, token: str) -> None:
        self.gauges = {"num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.1}
        self.values = dict.fromkeys(
            ("num_preemptions_total", "spec_decode_num_drafts_total", "spec_decode_num_accepted_tokens_total"), 0.0
        )
        self.steps = {"spec_decode_num_drafts_total": 10.0, "spec_decode_num_accepted_tokens_total": 15.0}
        self.waiting_step = 0.0
        self.token = token
        numbers = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                allowed = self.headers.get("Authorization") == f"Bearer {numbers.token}"
                body = numbers.text().encode() if allowed else b""
                self.send_response(200 if allowed else 401)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def text(self) -> str:
        for name, step in self.steps.items():
            self.values[name] += step
        self.gauges["num_requests_waiting"] += self.waiting_step
        return "".join(f"vllm:{name}{{{_LABELS}}} {value}\n" for name, value in (self.gauges | self.values).items())

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Prometheus:
    """The real program on our configuration, a scrape and an evaluation a second."""

    def __init__(self, program: str, folder: Path, launcher_port: int, vllm_port: int, token: str) -> None:
        (folder / "rules").mkdir(parents=True)
        for path in (ROOT / "configs/prometheus/rules").glob("*.yml"):
            (folder / "rules" / path.name).write_text(in_fast_motion(path.read_text()))
        (folder / "token").write_text(token)
        config = (ROOT / "configs/prometheus/prometheus.yml").read_text()
        port = free_port()
        for old, new in {
            "15s": "1s",
            "10s": "1s",
            "serve:9128": f"127.0.0.1:{launcher_port}",
            "serve:8000": f"127.0.0.1:{vllm_port}",
            "localhost:9090": f"127.0.0.1:{port}",
            "/run/secrets/metrics_token": str(folder / "token"),
        }.items():
            assert old in config
            config = config.replace(old, new)
        (folder / "prometheus.yml").write_text(config)
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stderr=self._log,
            env=os.environ | {"GOMAXPROCS": "1"},
        )
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def get(self, path: str, **query: str) -> Any:
        url = f"{self._url}/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)["data"]

    def firing(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"] if alert["state"] == "firing"}

    def wait(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if condition():
                    return
            except OSError:
                pass  # not listening yet
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s; firing are {self.firing()}"
            time.sleep(0.25)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        self._log.close()
