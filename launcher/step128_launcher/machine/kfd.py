"""GPUs as the compute driver sees them: /sys/class/kfd/kfd/topology/nodes, which gives the gfx target and the units.

Source: the kernel's drivers/gpu/drm/amd/amdkfd/kfd_topology.c. A node of a CPU has no SIMDs; for a GPU that the
container's device rules exclude, its files answer EPERM.
"""

from dataclasses import dataclass
from pathlib import Path

from step128_launcher.machine.reader import Reader, whole_number

_NODES = "sys/class/kfd/kfd/topology/nodes"


@dataclass(frozen=True)
class KfdNode:
    """One GPU node. `address` is (PCI domain, location id); the location id is bus << 8 | device << 3 | function."""

    index: int
    target: str | None
    compute_units: int | None
    address: tuple[int, int] | None
    render_minor: int | None
    has_cpu_cores: bool


@dataclass(frozen=True)
class Kfd:
    """The GPU nodes in the driver's order, and whether some node was denied to this process."""

    nodes: tuple[KfdNode, ...]
    some_denied: bool


def read_kfd(reader: Reader) -> Kfd:
    """Read all GPU nodes; none if the compute driver is not there."""
    folder = reader.root / _NODES
    nodes: list[KfdNode] = []
    denied = False
    for index in sorted(int(name) for name in reader.names(folder) if name.isascii() and name.isdigit()):
        path = folder / str(index) / "properties"
        text = reader.text(path)
        denied = denied or path in reader.denied
        if text is None:
            continue
        values = _properties(text)
        if not values:
            reader.note(path, "no line of a name and a number")
        elif values.get("simd_count"):
            nodes.append(_node(index, values))
    return Kfd(tuple(nodes), denied)


def gfx_target(version: int | None) -> str | None:
    """Return the compiler's name of a `gfx_target_version`: decimal pairs, the last two in hex; 110501 -> gfx1151."""
    if version is None or not 70000 <= version <= 999999:
        return None
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _properties(text: str) -> dict[str, int]:
    values: dict[str, int] = {}
    for line in text.splitlines():
        name, _, number = line.partition(" ")
        value = whole_number(number.strip())
        if value is not None:
            values[name] = value
    return values


def _node(index: int, values: dict[str, int]) -> KfdNode:
    simds, per_unit = values["simd_count"], values.get("simd_per_cu") or 2
    location = values.get("location_id")
    return KfdNode(
        index=index,
        target=gfx_target(values.get("gfx_target_version")),
        compute_units=simds // per_unit if simds // per_unit <= 4096 else None,
        address=None if location is None else (values.get("domain", 0), location),
        render_minor=values.get("drm_render_minor"),
        has_cpu_cores=values.get("cpu_cores_count", 0) > 0,
    )


def address_of(pci_address: str) -> tuple[int, int]:
    """Return (domain, location id) of a PCI address such as 0000:03:00.0."""
    domain, bus, rest = pci_address.split(":")
    device, function = rest.split(".")
    return int(domain, 16), int(bus, 16) << 8 | int(device, 16) << 3 | int(function)


def find_node(kfd: Kfd, pci_address: str | None, render_node: str | None) -> KfdNode | None:
    """Return the node of a card, by its PCI address or else by its render node (renderD128 is minor 128)."""
    for node in kfd.nodes:
        if pci_address is not None and node.address == address_of(pci_address):
            return node
    minor = None if render_node is None else whole_number(Path(render_node).name.removeprefix("renderD"))
    for node in kfd.nodes:
        if minor is not None and node.render_minor == minor:
            return node
    return None
