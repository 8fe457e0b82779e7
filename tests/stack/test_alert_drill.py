"""Every alert, once, in a real Prometheus over the real exporter: it fires for its cause, alone, and resolves."""

import collections
import runpy
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_drill import ROOT, NumbersOfVllm, Prometheus, free_port, write

from step128_launcher.commands.options import parse
from step128_launcher.commands.planned import make_planned
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.planning.plan import Plan
from step128_launcher.supervisor.comparison import compare, planned_figures
from step128_launcher.supervisor.exporter import Exporter
from step128_launcher.supervisor.hang import Activity
from step128_launcher.supervisor.reality import Reality
from step128_launcher.supervisor.status import ServerStatus, State
from step128_launcher.supervisor.verify import Check, Outcome
from step128_launcher.telemetry.collector import TelemetryCollector

PROGRAM = shutil.which("prometheus")
MACHINE = ROOT / "tests/machines/strix-halo-128-gtt120"
APU_METRICS: Callable[..., bytes] = runpy.run_path(str(ROOT / "tests/machines/make_trees.py"))["apu_metrics"]
ERROR = LauncherError(ExitCode.SERVER_FAILED, "it died")
MIB, GIB = 2**20, 2**30
MODEL = str(ROOT / "tests/data/step-3.7-flash-240")
SPL, THM_GFX = 1, 5  # places among the firmware's seven counters of throttling

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(PROGRAM is None, reason="no prometheus here (apt install prometheus)"),
]


class Box:
    """A Strix Halo box whose server runs: the exporter on a tree, and vLLM's numbers."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        shutil.copytree(MACHINE, self.tree, symlinks=True)
        (self.device,) = self.tree.glob("sys/devices/pci0000:00/*/0000:c5:00.0")
        arguments = ["plan", "--machine", str(MACHINE), "--policy", "all-linears", MODEL]
        self.plan: Plan = make_planned(parse(collections.defaultdict(lambda: print), arguments)).plan  # type: ignore[arg-type]
        self.vllm = NumbersOfVllm("secret")
        self.port = free_port()
        self.throttled_by: int | None = None
        self._counts, self._ended = [0] * 7, threading.Event()
        self._firmware = threading.Thread(target=self._count, daemon=True)
        self._firmware.start()
        self.up()

    def up(self) -> None:
        """Start the launcher anew, with a server that is ready."""
        self.status = ServerStatus()
        self.exporter = Exporter(self.status, "127.0.0.1", self.port, [TelemetryCollector(self.tree, print)])
        self.status.planned(self.plan)
        self.ready()

    def again(self) -> None:
        self.exporter.close()
        self.up()

    def ready(self) -> None:
        self.status.enter(State.STARTING)
        self.verify(Outcome.PASS)
        self.measure(0)
        self.status.enter(State.READY)

    def verify(self, outcome: Outcome) -> None:
        self.status.verified([Check("num_gpu_blocks", outcome, "")])

    def measure(self, more_bytes: int) -> None:
        seen = Reality(activation_bytes=self.plan.expected.activation_bytes + more_bytes)
        self.status.compared(compare(planned_figures(self.plan), seen))

    def hang(self) -> None:
        self.status.probed(False)
        self.status.hangs(Activity.IDLE)

    def restart_twice(self) -> None:
        self.status.restarted("crash", ERROR)
        self.status.restarted("crash", ERROR)

    def sensor(self, name: str, value: bytes | str | int) -> None:
        write(next(self.device.glob(name)), value)

    def memory(self, available_kib: int) -> None:
        write(self.tree / "proc/meminfo", f"MemTotal: 131072000 kB\nMemAvailable: {available_kib} kB\n")

    def close(self) -> None:
        self._ended.set()
        self._firmware.join()
        self.exporter.close()
        self.vllm.close()

    def _count(self) -> None:
        while not self._ended.wait(0.5):
            if self.throttled_by is not None:
                self._counts[self.throttled_by] += 70
                self.sensor("gpu_metrics", APU_METRICS(tuple(self._counts)))


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    yield box
    box.close()


@pytest.fixture
def prometheus(box: Box, tmp_path: Path) -> Iterator[Prometheus]:
    server = Prometheus(str(PROGRAM), tmp_path / "prometheus", box.port, box.vllm.port, "secret")
    yield server
    server.close()


Step = Callable[[], object]


def drills(box: Box) -> dict[str, tuple[Step, Step]]:
    """Alert, without its prefix -> its cause and its cure. The leak needs minutes of health, so it is last of those."""
    vllm = box.vllm

    def throttle(place: int | None) -> Step:
        return lambda: setattr(box, "throttled_by", place)

    def step(name: str, value: float) -> Step:
        return lambda: vllm.steps.update({name: value})

    def kv_cache(usage: float) -> Step:
        return lambda: vllm.gauges.update(kv_cache_usage_perc=usage)

    def queue(each: float) -> Step:
        return lambda: (setattr(vllm, "waiting_step", each), vllm.gauges.update(num_requests_waiting=0))

    unknown = struct.pack("<HBB", 300, 3, 1) + bytes(296)
    accepted = "spec_decode_num_accepted_tokens_total"
    return {
        "GpuHot": (
            lambda: box.sensor("hwmon/*/temp1_input", 96_000),
            lambda: box.sensor("hwmon/*/temp1_input", 41_000),
        ),
        "GpuThrottled": (throttle(THM_GFX), throttle(None)),
        "GpuPowerCapped": (throttle(SPL), throttle(None)),
        "GpuMetricsUnknown": (
            lambda: box.sensor("gpu_metrics", unknown),
            lambda: box.sensor("gpu_metrics", APU_METRICS()),
        ),
        "ExporterSourceError": (
            lambda: box.sensor("gpu_busy_percent", "much"),
            lambda: box.sensor("gpu_busy_percent", 3),
        ),
        "HostMemoryLow": (lambda: box.memory(1_000_000), lambda: box.memory(9_000_000)),
        "KvCacheFull": (kv_cache(0.99), kv_cache(0.2)),
        "Preemptions": (step("num_preemptions_total", 3), step("num_preemptions_total", 0)),
        "QueueGrowing": (queue(2), queue(0)),
        "MtpAcceptanceCollapsed": (step(accepted, 0.5), step(accepted, 15)),
        "PlanMismatch": (lambda: box.verify(Outcome.WARN), lambda: box.verify(Outcome.PASS)),
        "PlanTooLow": (lambda: box.measure(3 * GIB), lambda: box.measure(0)),
        "VllmMetricsMissing": (lambda: setattr(vllm, "token", "new"), lambda: setattr(vllm, "token", "secret")),
        "GpuMemoryLeak": (
            lambda: box.sensor("mem_info_gtt_used", 2 * GIB),
            lambda: box.sensor("mem_info_gtt_used", 24 * MIB),
        ),
        "ServerRestarting": (box.restart_twice, box.again),
        "OutOfMemoryStepDown": (lambda: box.status.stepped_down(ERROR), box.again),
        "ServerHung": (box.hang, lambda: box.status.probed(True)),
        "ServerNotReady": (lambda: box.status.enter(State.STARTING), box.ready),
        "ServerHeld": (lambda: box.status.failed(ERROR), box.again),
        "LauncherDown": (lambda: box.exporter.close(), box.up),
    }


def test_every_alert_fires_alone_and_resolves(
    box: Box, prometheus: Prometheus, measured: Callable[[str], None]
) -> None:
    started = time.monotonic()
    prometheus.wait("the targets are up", lambda: len(prometheus.get("query", query="up == 1")["result"]) == 3, 30)
    alerts = drills(box)
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules if rule["type"] == "alerting"} == {f"Step128{name}" for name in alerts}
    for name, (cause, cure) in alerts.items():
        only = {f"Step128{name}"}
        cause()
        prometheus.wait(f"{name} fires", lambda only=only: prometheus.firing() >= only, 150)
        assert prometheus.firing() == only
        cure()
        prometheus.wait(f"{name} resolves", lambda: not prometheus.firing(), 60)
    for rule in (rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]):
        assert rule["health"] == "ok" and not rule.get("lastError"), rule
    measured(f"{len(alerts)} alerts fired and resolved in a real Prometheus in {time.monotonic() - started:.0f} s")


def test_recorded_figures_are_there(box: Box, prometheus: Prometheus) -> None:
    for name in ("mtp_accepted_length:tokens_rate5m", "kv_cache_usage:ratio", "gpu_memory_used:bytes"):
        query = f"step128:{name}"
        prometheus.wait(query, lambda query=query: bool(prometheus.get("query", query=query)["result"]), 30)
    (length,) = prometheus.get("query", query="step128:mtp_accepted_length:tokens_rate5m")["result"]
    assert float(length["value"][1]) == pytest.approx(2.5, rel=0.01)
