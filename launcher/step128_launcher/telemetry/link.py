"""The PCIe link that limits a card: the slowest between it and the host.

`pcie_bw` is never read: it counts for a second before it answers.
"""

from collections.abc import Iterator
from pathlib import Path

from step128_launcher.machine.pcie import read_link
from step128_launcher.telemetry.cards import Card
from step128_launcher.telemetry.families import Sample
from step128_launcher.telemetry.readings import Readings


def read_pcie(readings: Readings, card: Card) -> Iterator[Sample]:
    """Yield speed and width, now and at best; nothing for an APU, whose link is inside the chip."""
    link = None if card.gpu.integrated else read_link(readings, Path(card.device))
    if link is None:
        return
    figures = {
        "speed_gts": link.speed_gts,
        "max_speed_gts": link.max_speed_gts,
        "width_lanes": link.width,
        "max_width_lanes": link.max_width,
    }
    for name, value in figures.items():
        if value is not None:
            yield Sample(f"step128_gpu_pcie_{name}", card.labels, float(value))
