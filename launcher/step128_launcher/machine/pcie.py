"""The PCIe link that really limits a card, its NUMA node and its IOMMU domain, from the card's sysfs folder.

Sources: the kernel's Documentation/ABI/testing/sysfs-bus-pci (`current_link_*`, `max_link_*`, `numa_node`) and
sysfs-kernel-iommu_groups (`type`).
"""

import itertools
import re
from pathlib import Path

from step128_launcher.machine.reader import Reader
from step128_launcher.machine.types import PcieLink

PCI_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_SPEED = re.compile(r"(\d+(?:\.\d+)?) GT/s(?: PCIe)?")
_WIDTHS = (1, 2, 4, 8, 12, 16, 32)
_MAX_SPEED_GTS = 128.0  # PCIe 7.0


def read_link(reader: Reader, device: Path) -> PcieLink | None:
    """Return the slowest link between the card and the root complex, or None where the machine does not tell one.

    A Radeon is a small PCIe switch with the GPU behind it: the GPU's own link is the one inside the chip, always 16
    lanes at full speed; what the slot gives is the link of the switch's upstream port, two levels up. An external
    switch adds more. So every level up to the root port is read, and the one with the least speed x width is what data
    to the host passes at. `max_*` is the least of all levels: what could be negotiated. An idle card may lower its
    current speed to save power, so a low speed alone is no fault.
    """
    links = [link for level in _path_to_root(device) if (link := _level(reader, level))]
    if not links:
        return None
    slowest = min(links, key=lambda link: link.speed_gts * link.width)
    speeds = [link.max_speed_gts for link in links if link.max_speed_gts is not None]
    widths = [link.max_width for link in links if link.max_width is not None]
    return PcieLink(slowest.speed_gts, slowest.width, min(speeds, default=None), min(widths, default=None))


def read_numa_node(reader: Reader, device: Path) -> int | None:
    """Return the card's NUMA node; None also for the kernel's -1, "this machine does not say"."""
    node = reader.integer(device / "numa_node", minimum=-1, maximum=1023)
    return None if node == -1 else node


def read_iommu_domain(reader: Reader, device: Path) -> str | None:
    """Return the type of the card's IOMMU domain, for example "identity" (iommu=pt) or "DMA-FQ"; None with no IOMMU."""
    return reader.text(device / "iommu_group/type")


def _path_to_root(device: Path) -> list[Path]:
    """Return the card's folder and its PCI ancestors: the resolved path's parents while they are PCI addresses."""
    device = device.resolve()
    return [device, *itertools.takewhile(lambda folder: PCI_ADDRESS.fullmatch(folder.name), device.parents)]


def _level(reader: Reader, folder: Path) -> PcieLink | None:
    speed = _read_speed(reader, folder / "current_link_speed")
    width = _read_width(reader, folder / "current_link_width")
    if speed is None or width is None:
        return None
    return PcieLink(
        speed,
        width,
        _read_speed(reader, folder / "max_link_speed"),
        _read_width(reader, folder / "max_link_width"),
    )


def _read_speed(reader: Reader, path: Path) -> float | None:
    text = reader.text(path)
    if text is None:
        return None
    match = _SPEED.fullmatch(text)
    if match is None or not 0 < float(match[1]) <= _MAX_SPEED_GTS:
        reader.note(path, f"{text[:40]!r} is no PCIe speed")
        return None
    return float(match[1])


def _read_width(reader: Reader, path: Path) -> int | None:
    width = reader.integer(path, maximum=255)
    if width is not None and width not in _WIDTHS:  # 0 and 255 stand for "no link" and "unknown"
        reader.note(path, f"{width} is no PCIe width")
        return None
    return width
