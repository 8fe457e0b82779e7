"""All telemetry as one Prometheus collector, read anew at each scrape."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from step128_launcher.machine.reader import exists
from step128_launcher.telemetry.cards import Card, Found, find_cards, list_card_names
from step128_launcher.telemetry.families import Sample, as_families
from step128_launcher.telemetry.gpu_metrics import read_table
from step128_launcher.telemetry.host import read_host
from step128_launcher.telemetry.kfd_memory import read_heaps, read_processes
from step128_launcher.telemetry.link import read_pcie
from step128_launcher.telemetry.memory import read_load, read_memory
from step128_launcher.telemetry.readings import Readings
from step128_launcher.telemetry.sensors import read_clocks, read_fan, read_power, read_temperatures

# What is read of each card; the names are the values of the label `source`.
_OF_A_CARD: dict[str, Callable[[Readings, Card], Iterator[Sample]]] = {
    "gpu_memory": read_memory,
    "gpu_load": read_load,
    "gpu_temperature": read_temperatures,
    "gpu_power": read_power,
    "gpu_fan": read_fan,
    "gpu_clocks": read_clocks,
    "gpu_pcie": read_pcie,
    "gpu_metrics": read_table,
}
_WHOLE = ("telemetry", "")  # the source that stands for all others


class TelemetryCollector(Collector):
    """Reads the machine below `root`.

    A read of a GPU that hangs may never return. The scrape that meets it is lost; those after it wait for
    `patience_seconds`, then say so in step128_exporter_source_error and leave the telemetry out, so that the rest of
    /metrics is still there when it is needed most. What cannot be read is said by `say`, in a scrape's own thread.
    """

    def __init__(self, root: Path, say: Callable[[str], None], patience_seconds: float = 1.0) -> None:
        self._readings = Readings(root, say)
        self._found: Found = find_cards(root)
        self._missing: set[str] = set()
        self._patience_seconds = patience_seconds
        self._lock = threading.Lock()

    def collect(self) -> Iterable[Metric]:
        """Yield all families that have a sample."""
        if not self._lock.acquire(timeout=self._patience_seconds):
            yield from as_families([Sample("step128_exporter_source_error", _WHOLE, 1.0)])
            return
        try:
            samples = list(self._samples())
        finally:
            self._lock.release()
        yield from as_families(samples)

    def _samples(self) -> Iterator[Sample]:
        started = time.perf_counter()
        readings = self._readings
        self._look_again()
        for card in self._found.cards:
            yield _info(card)
            for source, read in _OF_A_CARD.items():
                readings.read_for(source, card.gpu.pci_address)
                yield from read(readings, card)
        readings.read_for("kfd")
        yield from read_heaps(readings, self._found.nodes)
        yield from read_processes(readings, self._found.nodes)
        readings.read_for("host")
        yield from read_host(readings)
        if self._found.unified is not None:
            yield Sample("step128_host_unified_memory", (), float(self._found.unified))
        yield from self._own(time.perf_counter() - started)

    def _look_again(self) -> None:
        """Start a scrape; a card that was there before and is gone is an error for as long as this process lives."""
        readings = self._readings
        vanished = readings.something_vanished
        readings.begin()
        readings.read_for("cards")
        if list_card_names(readings) != self._found.card_names or (vanished and self._driver_was_replaced()):
            self._find()
        for address in sorted(self._missing):
            readings.read_for("cards", address)
            readings.drop("vanished", "this GPU was there before")

    def _driver_was_replaced(self) -> bool:
        """Whether the folder of some card's sensors is gone: its number changes when the driver is loaded again."""
        return any(card.hwmon is not None and not exists(Path(card.hwmon)) for card in self._found.cards)

    def _find(self) -> None:
        before, self._found = self._found, find_cards(self._readings.root)
        there = {card.gpu.pci_address for card in self._found.cards}
        self._missing |= {card.gpu.pci_address for card in before.cards}
        self._missing -= there
        for folder in _folders(before) - _folders(self._found):
            self._readings.forget(folder)

    def _own(self, seconds: float) -> Iterator[Sample]:
        readings = self._readings
        yield Sample("step128_exporter_source_error", _WHOLE, 0.0)
        for source, failed in readings.sources.items():
            yield Sample("step128_exporter_source_error", source, float(failed))
        for labels, count in readings.dropped.items():
            yield Sample("step128_exporter_dropped_reads", labels, float(count))
        for card in self._found.cards:
            unknown = readings.unknown_tables[card.labels]
            yield Sample("step128_gpu_metrics_unknown", card.labels, float(unknown))
        yield Sample("step128_exporter_collect_seconds", (), seconds)


def _folders(found: Found) -> set[str]:
    """Return the folders that are read of the cards."""
    return {folder for card in found.cards for folder in (card.device, card.hwmon) if folder is not None}


def _info(card: Card) -> Sample:
    gpu = card.gpu
    labels = (gpu.name, gpu.target or "", gpu.pci_id, str(gpu.integrated).lower(), gpu.render_node or "")
    return Sample("step128_gpu_info", (*card.labels, *labels), 1.0)
