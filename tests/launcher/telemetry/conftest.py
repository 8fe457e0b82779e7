"""A machine's tree to spoil, and the exporter's output as values."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from step128_launcher.telemetry.collector import TelemetryCollector

MACHINES = Path(__file__).parents[2] / "machines"


class Scraper:
    """One exporter's telemetry; each `scrape` is what Prometheus would read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.said: list[str] = []
        self.collector = TelemetryCollector(root, self.said.append, patience_seconds=0.2)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self.collector)

    def text(self) -> str:
        return generate_latest(self._registry).decode()

    def scrape(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Name -> values of all labels, in the order of the labels' names -> value."""
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(self.text()):
            for sample in family.samples:
                labels = tuple(sample.labels[name] for name in sorted(sample.labels))
                series = found.setdefault(sample.name, {})
                assert labels not in series, (sample.name, labels)
                series[labels] = sample.value
        return found

    def errors(self) -> set[tuple[str, str]]:
        """The (gpu, source) that failed in a new scrape."""
        return {labels for labels, value in self.scrape()["step128_exporter_source_error"].items() if value}


@pytest.fixture
def scraper() -> type[Scraper]:
    return Scraper


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a machine's tree, links as links."""

    def copy(name: str) -> Path:
        out = tmp_path / name
        shutil.copytree(MACHINES / name, out, symlinks=True)
        return out

    return copy
