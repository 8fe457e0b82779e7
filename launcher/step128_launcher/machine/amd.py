"""AMD GPUs: every /sys/class/drm/card* whose vendor is 0x1002 and whose driver is amdgpu.

Sources: the kernel's Documentation/gpu/amdgpu (driver-misc, thermal: `mem_info_*`, `unique_id`, `fw_version`, hwmon
`power1_cap` in microwatts); LLVM's AMDGPUUsage, table of processors (which targets are APUs).
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from step128_launcher.machine.kfd import Kfd, KfdNode, find_node, read_kfd
from step128_launcher.machine.pcie import PCI_ADDRESS, read_iommu_domain, read_link, read_numa_node
from step128_launcher.machine.reader import Reader, exists
from step128_launcher.machine.types import AMD, Gpu

_VENDOR = "0x1002"
_NAMES = {
    "0x7551": "AMD Radeon AI PRO R9700",
    "0x7550": "AMD Radeon RX 9070 / 9070 XT",
    "0x7448": "AMD Radeon PRO W7900",
    "0x744c": "AMD Radeon RX 7900 XT / XTX",
    "0x1586": "AMD Radeon 8060S (Strix Halo)",
    "0x164e": "AMD Radeon Graphics (Ryzen desktop)",
}
# Targets that exist only as part of a CPU, and only as cards, by LLVM's table. Device ids answer where the compute
# driver does not.
_APU_TARGETS = frozenset(
    {"gfx902", "gfx909", "gfx90c", "gfx1013", "gfx1033", "gfx1035", "gfx1036", "gfx1037", "gfx1103", "gfx1150"}
    | {"gfx1151", "gfx1152", "gfx1153"}
)
_CARD_TARGETS = frozenset(
    {"gfx906", "gfx908", "gfx90a", "gfx1030", "gfx1031", "gfx1032", "gfx1100", "gfx1101", "gfx1102", "gfx1200"}
    | {"gfx1201"}
)
_APU_DEVICES = frozenset({"0x1586", "0x164e", "0x150e", "0x15bf", "0x15c8", "0x13c0"})
_MAX_POWER_MICROWATTS = 5_000_000_000


@dataclass(frozen=True)
class AmdGpus:
    """The cards in the order of their PCI addresses, and the firmware versions found with them."""

    gpus: tuple[Gpu, ...]
    firmware: dict[str, str] = field(default_factory=dict)


def read_amd_gpus(reader: Reader) -> AmdGpus:
    """Read every card that the amdgpu driver holds."""
    kfd = read_kfd(reader)
    folder = reader.root / "sys/class/drm"
    gpus: list[Gpu] = []
    firmware: dict[str, str] = {}
    for name in reader.names(folder):  # cards also list their connectors here, as card0-DP-1
        device = folder / name / "device"
        if re.fullmatch(r"card\d+", name) and _is_amdgpu(reader, device):
            gpu = _read_card(reader, device, name, kfd)
            gpus.append(gpu)
            firmware |= _firmware(reader, device, gpu.pci_address)
    return AmdGpus(tuple(sorted(gpus, key=lambda gpu: gpu.pci_address)), firmware)


def _is_amdgpu(reader: Reader, device: Path) -> bool:
    """Whether vendor and driver say so; if one of the two files is unusable, the other decides."""
    vendor = reader.text(device / "vendor")
    driver = _uevent(reader, device).get("DRIVER")
    if vendor is None or vendor == "0xffff" or not re.fullmatch(r"0x[0-9a-f]{4}", vendor):
        if vendor is not None:
            reader.note(device / "vendor", f"{vendor[:40]!r} is no PCI vendor")
        return driver == "amdgpu"
    return vendor == _VENDOR and driver in (None, "amdgpu")


def _uevent(reader: Reader, device: Path) -> dict[str, str]:
    lines = (reader.text(device / "uevent") or "").splitlines()
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def _read_card(reader: Reader, device: Path, card: str, kfd: Kfd) -> Gpu:
    address = _pci_address(reader, device)
    render = _render_node(reader, device)
    node = find_node(kfd, address, render)
    device_id = reader.text(device / "device")
    if device_id is not None and not re.fullmatch(r"0x[0-9a-f]{4}", device_id):
        reader.note(device / "device", f"{device_id[:40]!r} is no PCI device")
        device_id = None
    vram_total, vram_used = _memory(reader, device, "vram")
    gtt_total, gtt_used = _memory(reader, device, "gtt")
    integrated = _is_integrated(reader, device, node, device_id)
    return Gpu(
        vendor=AMD,
        pci_address=address or card,
        pci_id=f"1002:{device_id.removeprefix('0x') if device_id else '????'}",
        name=_name(reader, device, device_id),
        target=node.target if node else None,
        compute_units=node.compute_units if node else None,
        integrated=integrated,
        vram_total_bytes=vram_total,
        vram_used_bytes=vram_used,
        visible_vram_bytes=_memory(reader, device, "vis_vram")[0],
        gtt_total_bytes=gtt_total,
        gtt_used_bytes=gtt_used,
        link=None if integrated else read_link(reader, device),
        numa_node=read_numa_node(reader, device),
        power_cap_watts=_power_cap(reader, device),
        render_node=render,
        # ROCm passes over a GPU whose node the container's device rules deny.
        visible=node is not None or not kfd.some_denied,
        kfd_node=node.index if node else None,
        unique_id=reader.text(device / "unique_id"),
        iommu_domain=read_iommu_domain(reader, device),
    )


def _pci_address(reader: Reader, device: Path) -> str | None:
    """Return the address from uevent, or else from the name of the folder that sysfs links to."""
    for address in (_uevent(reader, device).get("PCI_SLOT_NAME"), device.resolve().name):
        if address is not None and PCI_ADDRESS.fullmatch(address):
            return address
    reader.note(device / "uevent", "no PCI_SLOT_NAME")
    return None


def _render_node(reader: Reader, device: Path) -> str | None:
    nodes = [name for name in reader.names(device / "drm") if re.fullmatch(r"renderD\d+", name)]
    return f"/dev/dri/{nodes[0]}" if nodes else None


def _is_integrated(reader: Reader, device: Path, node: KfdNode | None, device_id: str | None) -> bool:
    """Whether the GPU shares the CPU's memory; the first evidence there is decides.

    Not the size of the carve-out (firmware offers 0.5 to 96 GiB), nor a KFD node with CPU cores alone: recent kernels
    give APUs a node of their own, as if they were cards. So: the gfx target, where LLVM's table knows it for an APU;
    the PCI device; a node of both CPU cores and SIMDs; and that the driver offers `mem_busy_percent` for cards only
    (amdgpu_pm.c), looked at where it does offer `gpu_busy_percent`.
    """
    target = node.target if node else None
    if target in _APU_TARGETS | _CARD_TARGETS:
        return target in _APU_TARGETS
    if device_id in _APU_DEVICES or (node is not None and node.has_cpu_cores):
        return True
    if device_id in _NAMES:
        return False
    return exists(device / "gpu_busy_percent") and not exists(device / "mem_busy_percent")


def _memory(reader: Reader, device: Path, pool: str) -> tuple[int | None, int | None]:
    """Return total and used bytes of a pool; a use above the total is no figure."""
    total_path, used_path = device / f"mem_info_{pool}_total", device / f"mem_info_{pool}_used"
    total, used = reader.integer(total_path, minimum=1), reader.integer(used_path)
    if total is not None and used is not None and used > total:
        reader.note(used_path, f"{used} is more than the total {total}")
        used = None
    return total, used


def _power_cap(reader: Reader, device: Path) -> float | None:
    for name in reader.names(device / "hwmon"):
        cap = reader.integer(device / "hwmon" / name / "power1_cap", 1_000_000, _MAX_POWER_MICROWATTS)
        if cap is not None:
            return cap / 1e6
    return None


def _name(reader: Reader, device: Path, device_id: str | None) -> str:
    """Return the board's own name if it tells one (professional cards with a FRU chip do), or ours for the id."""
    return reader.text(device / "product_name") or _NAMES.get(device_id or "", f"AMD GPU {device_id or 'unknown'}")


def _firmware(reader: Reader, device: Path, address: str) -> dict[str, str]:
    """Return "ADDRESS name" -> version for the VBIOS and every firmware the card loaded."""
    found = {"vbios": reader.text(device / "vbios_version")}
    for name in reader.names(device / "fw_version"):
        found[name.removesuffix("_fw_version")] = reader.text(device / "fw_version" / name)
    return {f"{address} {name}": version for name, version in found.items() if version}
