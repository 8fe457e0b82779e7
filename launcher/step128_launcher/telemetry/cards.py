"""Which AMD GPUs there are, and where their files lie; looked for once, and again when something changed."""

import re
from dataclasses import dataclass
from pathlib import Path

from step128_launcher.machine.amd import read_amd_gpus
from step128_launcher.machine.kfd import KfdNode, find_node, read_kfd
from step128_launcher.machine.reader import Reader, exists
from step128_launcher.machine.types import Gpu

_CARD = re.compile(r"card\d+")
_SENSORS = {"temp1": "edge", "temp2": "junction", "temp3": "mem"}  # amdgpu's order, should a label not be readable
_SENSOR_NAME = re.compile(r"[A-Za-z0-9_]{1,20}")


@dataclass(frozen=True)
class Card:
    """One GPU: `device` is its folder in sysfs, `hwmon` that of its sensors, `sensors` (file, name) of temperatures."""

    gpu: Gpu
    name: str
    device: str
    hwmon: str | None
    sensors: tuple[tuple[str, str], ...]

    @property
    def labels(self) -> tuple[str, str]:
        """Values of the labels gpu and card."""
        return self.gpu.pci_address, self.name


@dataclass(frozen=True)
class Node:
    """One node of the compute driver; `gpu` is "" for a CPU, `gpu_id` the driver's own number of a GPU."""

    index: int
    gpu: str
    gpu_id: str | None
    banks: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """The cards in the order of their addresses, the nodes in the driver's."""

    card_names: tuple[str, ...]
    cards: tuple[Card, ...]
    nodes: tuple[Node, ...]
    unified: bool | None


def list_card_names(reader: Reader) -> tuple[str, ...]:
    """Return the kernel's names of all display devices, AMD's or not: cheap, to see whether something changed."""
    return tuple(name for name in reader.names(reader.root / "sys/class/drm") if _CARD.fullmatch(name))


def find_cards(root: Path) -> Found:
    """Look for cards and nodes below `root`; `unified` is None beside an NVIDIA GPU, of which nothing is read here."""
    reader = Reader(root)
    gpus = read_amd_gpus(reader).gpus
    folders = _device_folders(reader)
    cards = tuple(_card(reader, gpu, *folders[gpu.pci_address]) for gpu in gpus if gpu.pci_address in folders)
    unified = None if exists(reader.root / "dev/nvidiactl") else all(gpu.integrated for gpu in gpus)
    return Found(list_card_names(reader), cards, tuple(_nodes(reader, gpus)), unified)


def _device_folders(reader: Reader) -> dict[str, tuple[str, Path]]:
    """Return PCI address (or the card's name, as Gpu has it where there is none) -> name and folder of each card."""
    folders: dict[str, tuple[str, Path]] = {}
    for name in list_card_names(reader):
        device = (reader.root / "sys/class/drm" / name / "device").resolve()
        uevent = reader.text(device / "uevent") or ""
        slot = re.search(r"^PCI_SLOT_NAME=(\S+)$", uevent, re.MULTILINE)
        for address in (slot[1] if slot else device.name, name):
            folders.setdefault(address, (name, device))
    return folders


def _card(reader: Reader, gpu: Gpu, name: str, device: Path) -> Card:
    folders = [folder for folder in reader.names(device / "hwmon") if folder.startswith("hwmon")]
    hwmon = device / "hwmon" / folders[0] if folders else None
    sensors = []
    for file, usual in _SENSORS.items():
        label = reader.text(hwmon / f"{file}_label") if hwmon else None
        sensors.append((file, label if label and _SENSOR_NAME.fullmatch(label) else usual))
    return Card(gpu, name, str(device), str(hwmon) if hwmon else None, tuple(sensors))


def _nodes(reader: Reader, gpus: tuple[Gpu, ...]) -> list[Node]:
    """Return the nodes that this process may read; a GPU that the container may not use is denied, and left out."""
    folder = reader.root / "sys/class/kfd/kfd/topology/nodes"
    kfd = read_kfd(reader)
    owners: dict[int, str] = {}
    for gpu in gpus:
        node: KfdNode | None = find_node(kfd, _address(gpu), gpu.render_node)
        if node is not None:
            owners[node.index] = gpu.pci_address
    nodes = []
    for index in sorted(int(name) for name in reader.names(folder) if name.isascii() and name.isdigit()):
        path = folder / str(index)
        if reader.text(path / "properties") is None:
            continue
        banks = tuple(str(path / "mem_banks" / bank / "properties") for bank in reader.names(path / "mem_banks"))
        gpu_id = reader.text(path / "gpu_id")
        known = gpu_id if gpu_id and gpu_id.isascii() and gpu_id.isdigit() and gpu_id != "0" else None
        nodes.append(Node(index, owners.get(index, ""), known, banks))
    return nodes


def _address(gpu: Gpu) -> str | None:
    return gpu.pci_address if ":" in gpu.pci_address else None
