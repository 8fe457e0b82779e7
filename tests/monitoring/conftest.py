"""What the launcher's exporter really says, with a plan for each box, and the rules that Prometheus is given."""

import collections
import socket
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from step128_launcher.commands.options import parse
from step128_launcher.commands.planned import make_planned
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.supervisor.comparison import compare, planned_figures
from step128_launcher.supervisor.exporter import Exporter
from step128_launcher.supervisor.hang import Activity
from step128_launcher.supervisor.reality import Reality
from step128_launcher.supervisor.status import ServerStatus, State
from step128_launcher.supervisor.verify import Check, Outcome
from step128_launcher.telemetry.collector import TelemetryCollector

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "configs/prometheus"


@dataclass(frozen=True)
class Rule:
    """One alert or recorded series."""

    file: str
    name: str
    expr: str
    alert: dict[str, Any] | None  # the whole rule, of an alert


@pytest.fixture(scope="session")
def rules() -> list[Rule]:
    found = []
    for path in sorted((PROMETHEUS / "rules").glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                alert = rule if "alert" in rule else None
                found.append(Rule(path.name, rule.get("alert") or rule["record"], rule["expr"], alert))
    return found


@pytest.fixture(scope="session")
def scraped() -> dict[str, str]:
    """What the real exporter says on each of our boxes."""
    names = ("quad-r9700", "strix-halo-128-gtt120")
    return {name: scrape(ROOT / "tests/machines" / name) for name in names}


@pytest.fixture(scope="session")
def exported(scraped: dict[str, str]) -> dict[str, set[str]]:
    """Name of each sample -> names of its labels, of the real exporter on both boxes."""
    found: dict[str, set[str]] = {}
    for text in scraped.values():
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def scrape(machine: Path) -> str:
    """/metrics of a server that is planned for the machine, runs otherwise than planned, and gave up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    status = ServerStatus()
    exporter = Exporter(status, "127.0.0.1", port, [TelemetryCollector(machine, print)])
    try:
        fill(status, machine)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())
    finally:
        exporter.close()


def fill(status: ServerStatus, machine: Path) -> None:
    model = str(ROOT / "tests/data/step-3.7-flash-240")
    arguments = ["plan", "--machine", str(machine), "--policy", "all-linears", model]
    plan = make_planned(parse(collections.defaultdict(lambda: print), arguments)).plan  # type: ignore[arg-type]
    error = LauncherError(ExitCode.SERVER_FAILED, "it died")
    status.planned(plan)
    status.enter(State.STARTING)
    status.verified([Check("num_gpu_blocks", Outcome.WARN, "found 1, expected 2")])
    measured = Reality(weights_bytes=1, kv_cache_bytes=2, num_gpu_blocks=3, activation_bytes=4, graph_bytes=5)
    status.compared(compare(planned_figures(plan), measured))
    status.enter(State.READY)
    status.probed(False)
    status.hangs(Activity.IDLE)
    status.restarted("crash", error)
    status.stepped_down(error)
    status.failed(error)
