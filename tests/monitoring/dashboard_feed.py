"""Something to look at: a real Prometheus over the real exporter on a recorded box, and vLLM's metrics by their names.

All figures are made: they move as a served model's might, and stand for nothing that was measured.
"""

from __future__ import annotations

import collections
import http.server
import math
import random
import runpy
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_drill import ROOT, Prometheus, free_port, write

from step128_launcher.commands.options import parse
from step128_launcher.commands.planned import make_planned
from step128_launcher.planning.plan import Plan
from step128_launcher.supervisor.comparison import compare, planned_figures
from step128_launcher.supervisor.exporter import Exporter
from step128_launcher.supervisor.reality import Reality
from step128_launcher.supervisor.status import ServerStatus, State
from step128_launcher.supervisor.verify import Check, Outcome
from step128_launcher.telemetry.collector import TelemetryCollector

BOXES = ("quad-r9700", "strix-halo-128-gtt120")
TOKEN = "a token of the test"
_MODEL = str(ROOT / "tests/data/step-3.7-flash-240")
_NAMES = ROOT / "tests/monitoring/vllm_0_32_metrics.txt"
_TREES = runpy.run_path(str(ROOT / "tests/machines/make_trees.py"))
_OWN_LABELS = {
    "num_requests_waiting_by_reason": ("reason", ("capacity", "deferred")),
    "request_success": ("finished_reason", ("stop", "length", "abort", "error", "repetition")),
    "spec_decode_num_accepted_tokens_per_pos": ("position", ("0", "1", "2")),
}
# Added to counters in a second of full load.
_STEPS = {
    "generation_tokens": 70.0,
    "prompt_tokens": 800.0,
    "prompt_tokens_cached": 420.0,
    "prefix_cache_queries": 800.0,
    "prefix_cache_hits": 420.0,
    "spec_decode_num_drafts": 29.0,
    "spec_decode_num_draft_tokens": 87.0,
    "spec_decode_num_accepted_tokens": 41.0,
}
_POSITIONS = {"0": 22.0, "1": 12.0, "2": 7.0}
# Middle of each histogram's observations.
_MIDDLES = {
    "time_to_first_token_seconds": 0.9,
    "inter_token_latency_seconds": 0.02,
    "e2e_request_latency_seconds": 9.0,
    "request_queue_time_seconds": 0.05,
    "request_prefill_time_seconds": 0.7,
    "request_prompt_tokens": 1800.0,
    "request_generation_tokens": 420.0,
}
_BUCKETS = [10.0 ** (power / 4) for power in range(-14, 22)]


class MovingVllm:
    """vLLM's /metrics, with every name of vllm_0_32_metrics.txt; `load` between 0 and 1 drives it."""

    def __init__(self) -> None:
        self.load = 0.0
        self.registry = CollectorRegistry()
        self._random = random.Random(7)
        self.metrics: dict[str, Any] = {}
        for line in _NAMES.read_text().splitlines():
            if not line.startswith("#"):
                kind, name = line.split()
                self._add(kind, name.removeprefix("vllm:"))
        self.refused = Counter("step128_requests_refused", "Refused.", ["reason"], registry=self.registry)
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                self.send_response(200 if allowed else 401)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(generate_latest(server.registry) if allowed else b"")

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _add(self, kind: str, name: str) -> None:
        own = _OWN_LABELS.get(name)
        labels = ["model_name", "engine", *([own[0]] if own else [])]
        make = {"gauge": Gauge, "counter": Counter, "histogram": Histogram}[kind]
        more = {"buckets": _BUCKETS} if kind == "histogram" else {}
        metric = make(f"vllm:{name}", name, labels, registry=self.registry, **more)
        for value in own[1] if own else (None,):
            key = name if value is None else f"{name}/{value}"
            self.metrics[key] = metric.labels("step", "0", *([] if value is None else [value]))

    def second(self) -> None:
        """Let a second pass."""
        load, some = self.load, self._random
        for name, step in _STEPS.items():
            self.metrics[name].inc(step * load * some.uniform(0.9, 1.1))
        for position, step in _POSITIONS.items():
            self.metrics[f"spec_decode_num_accepted_tokens_per_pos/{position}"].inc(step * load)
        for name, middle in _MIDDLES.items():
            for _ in range(round(6 * load)):
                self.metrics[name].observe(middle * some.lognormvariate(0, 0.5))
        running, waiting = round(14 * load), max(0, round(8 * (load - 0.75)))
        self.metrics["num_requests_running"].set(running)
        self.metrics["num_requests_waiting"].set(waiting)
        self.metrics["num_requests_waiting_by_reason/capacity"].set(waiting)
        self.metrics["kv_cache_usage_perc"].set(0.75 * load)
        self.metrics["request_success/stop"].inc(some.random() * load)
        self.metrics["request_success/length"].inc(0.2 * some.random() * load)
        if some.random() < 0.1 * load:
            self.refused.labels("no_key").inc()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class MovingBox:
    """A recorded box whose sensors follow the load, with the real exporter on it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.tree, self.load = folder / "tree", 0.0
        shutil.copytree(ROOT / "tests/machines" / name, self.tree, symlinks=True)
        arguments = ["plan", "--machine", str(self.tree), "--policy", "all-linears", _MODEL]
        self.plan: Plan = make_planned(parse(collections.defaultdict(lambda: print), arguments)).plan  # type: ignore[arg-type]
        self.devices = sorted({path.parent for path in self.tree.glob("sys/devices/**/gpu_busy_percent")})
        self.status, self.port = ServerStatus(), free_port()
        self.exporter = Exporter(self.status, "127.0.0.1", self.port, [TelemetryCollector(self.tree, print)])
        self.status.planned(self.plan)

    def start(self) -> None:
        self.status.enter(State.STARTING)

    def ready(self) -> None:
        """Reach the state of a verified server that took a little less than was planned."""
        planned = planned_figures(self.plan)
        self.status.enter(State.VERIFYING)
        names = ("model", "quantization", "kernels", "num_gpu_blocks", "mtp", "attention")
        self.status.verified([Check(name, Outcome.PASS, "") for name in names])
        seen = Reality(
            weights_bytes=round(planned["weights"] * 1.001),
            activation_bytes=round(planned["activations"] * 0.87),
            graph_bytes=round(planned["graphs"] * 1.04),
            kv_cache_bytes=round(planned["kv_cache"]),
            num_gpu_blocks=round(planned["num_gpu_blocks"]),
        )
        self.status.compared(compare(planned, seen))
        self.status.enter(State.READY)

    def second(self) -> None:
        """Let the sensors follow the load; memory is taken at the start and stays taken."""
        taken = sum(line.total_bytes for line in self.plan.memory.lines)
        for place, device in enumerate(self.devices):
            load = self.load * (1 - 0.03 * place)
            pool = "vram" if (device / "mem_busy_percent").exists() else "gtt"
            self._write(device, f"mem_info_{pool}_used", int(taken if self.load else 64 * 2**20))
            self._write(device, "gpu_busy_percent", round(100 * load))
            self._write(device, "mem_busy_percent", round(80 * load))
            self._write(device, "hwmon/*/temp1_input", round(1000 * (41 + 20 * load + place)))
            self._write(device, "hwmon/*/temp2_input", round(1000 * (44 + 33 * load + 2 * place)))
            self._write(device, "hwmon/*/temp3_input", round(1000 * (52 + 30 * load + place)))
            self._write(device, "hwmon/*/power1_average", round(1_000_000 * (24 + 230 * load)))
            self._write(device, "hwmon/*/freq1_input", round(1e6 * (500 + 2400 * load)))
            self._write(device, "hwmon/*/freq2_input", round(1e6 * (96 + 1100 * load)))
            self._write(device, "hwmon/*/pwm1", round(255 * (0.2 + 0.4 * load)))

    def throttle(self, bits: int) -> None:
        """Let the first card's firmware say that it holds the clocks down."""
        self._write(self.devices[0], "gpu_metrics", _TREES["card_metrics"](bits))

    def close(self) -> None:
        self.exporter.close()

    def _write(self, device: Path, pattern: str, value: int | bytes) -> None:
        for path in device.glob(pattern):
            write(path, value)


@contextmanager
def fed(name: str, folder: Path, program: str) -> Iterator[tuple[Prometheus, Callable[[int], None], MovingBox]]:
    """Yield a Prometheus over the box, what lets seconds pass (the load swings), and the box; it is loading yet."""
    box, vllm = MovingBox(name, folder), MovingVllm()
    prometheus = Prometheus(program, folder / "prometheus", box.port, vllm.port, TOKEN)

    def pass_seconds(count: int) -> None:
        for _ in range(count):
            ready = box.status.snapshot().state is State.READY
            load = 0.62 + 0.3 * math.sin(time.monotonic() / 9) if ready else 0.0
            box.load, vllm.load = max(load, 0.0), max(load, 0.0)
            box.second()
            vllm.second()
            time.sleep(1)

    try:
        yield prometheus, pass_seconds, box
    finally:
        prometheus.close()
        vllm.close()
        box.close()
