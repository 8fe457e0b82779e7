"""Write the made trees of this folder: machines as the launcher's probe would find them, file by file.

Nobody recorded them: paths, formats and units are the documented ones (each tree's ORIGIN names them), sizes are the
makers' less what firmware is known or assumed to keep. Run `python tests/machines/make_trees.py` after a change; a
test compares the trees with what this writes. A recorded tree is welcome beside them, with an ORIGIN that says so.
"""

import shutil
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

MIB, GIB = 2**20, 2**30
KFD = "sys/class/kfd/kfd/topology/nodes"
SOURCES = """
Sources: the kernel's Documentation/gpu/amdgpu (mem_info_*, hwmon power1_cap in microwatts, fw_version), amdkfd's
kfd_topology.c (topology/nodes/N/properties), Documentation/ABI/testing/sysfs-bus-pci (current_link_*, numa_node),
drivers/gpu/drm/ttm (pages_limit, 4 KiB pages), proc(5), the kernel's cgroup-v2 document. Device nodes are plain files.
"""
TELEMETRY_SOURCES = """
What only the exporter reads holds invented figures of an idle machine in the documented units: hwmon (in
Documentation/hwmon/sysfs-interface: millidegrees, microwatts, Hz, pwm1 of 255), pp_dpm_* and
power_dpm_force_performance_level (Documentation/gpu/amdgpu/thermal), gpu_metrics (packed by struct after
drivers/gpu/drm/amd/include/kgd_pp_interface.h), the compute driver's mem_banks, gpu_id and proc/PID/vram_GPUID.
"""
NVIDIA_SOURCES = """
Sources: nvidia-smi(1) and `nvidia-smi --help-query-gpu` (commands/nvidia-smi.csv is what `nvidia-smi --query-gpu=...
--format=csv,noheader,nounits` prints for the fields in machine/nvidia.py), proc(5). Device nodes are plain files.
"""


@dataclass(frozen=True)
class Card:
    """One AMD GPU. `path` is its chain of PCI addresses from the root port on; `links` the link of each level."""

    card: int
    path: tuple[str, ...]
    links: tuple[tuple[str, int], ...]
    device: int
    target_version: int
    simds: int
    vram_bytes: int
    visible_bytes: int
    gtt_bytes: int
    vram_used_bytes: int = 64 * MIB
    gtt_used_bytes: int = 24 * MIB
    numa_node: int = -1
    power_cap_watts: int | None = None
    iommu: str = "identity"
    sensors: str | None = None  # "card" or "apu": also write what only the exporter reads

    @property
    def address(self) -> str:
        return self.path[-1]


class Tree:
    def __init__(self, folder: Path, origin: str) -> None:
        self.root = folder
        if folder.exists():
            shutil.rmtree(folder)
        self.write("ORIGIN", "Made from the documented paths and units, not recorded.\n" + origin.strip())

    def write(self, path: str, *lines: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in lines))

    def link(self, path: str, target: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.symlink_to(target)

    def host(self, total_kib: int, available_kib: int, cpus: int, release: str, command_line: str = "quiet") -> None:
        self.write(
            "proc/meminfo",
            f"MemTotal:       {total_kib} kB",
            f"MemAvailable:   {available_kib} kB",
            "SwapTotal:       8388604 kB",
            "SwapFree:        8388604 kB",
        )
        self.write(
            "proc/self/status",
            "Name:\tpython",
            "Gid:\t1000\t1000\t1000\t1000",
            "Groups:\t44 992 1000",
            f"Cpus_allowed_list:\t0-{cpus - 1}",
        )
        self.write("proc/sys/kernel/osrelease", release)
        self.write("proc/cmdline", f"BOOT_IMAGE=/vmlinuz-{release} root=/dev/nvme0n1p2 ro {command_line}")
        self.write("commands/shm_bytes", total_kib * 1024 // 2)

    def amd(self, *cards: Card, pages_limit: int, cpus: int) -> None:
        self.write("dev/kfd")
        self.write("sys/module/ttm/parameters/pages_limit", pages_limit)
        cpu = f"cpu_cores_count {cpus}", "simd_count 0", "mem_banks_count 1", "gfx_target_version 0"
        self.write(f"{KFD}/0/properties", *cpu)
        for number, card in enumerate(cards, start=1):
            self._card(card, minor=127 + number)
            self._kfd_node(card, number, minor=127 + number)

    def _card(self, card: Card, minor: int) -> None:
        bus = f"sys/devices/pci{card.path[0][:7]}"
        for depth, (speed, width) in enumerate(card.links, start=1):
            level = "/".join((bus, *card.path[:depth]))
            self.write(f"{level}/current_link_speed", f"{speed} GT/s PCIe")
            self.write(f"{level}/max_link_speed", f"{speed} GT/s PCIe")
            self.write(f"{level}/current_link_width", width)
            self.write(f"{level}/max_link_width", width)
        device = "/".join((bus, *card.path))
        self.write(f"{device}/vendor", "0x1002")
        self.write(f"{device}/device", f"{card.device:#06x}")
        self.write(f"{device}/uevent", "DRIVER=amdgpu", f"PCI_SLOT_NAME={card.address}")
        self.write(f"{device}/numa_node", card.numa_node)
        self.write(f"{device}/mem_info_vram_total", card.vram_bytes)
        self.write(f"{device}/mem_info_vram_used", card.vram_used_bytes)
        self.write(f"{device}/mem_info_vis_vram_total", card.visible_bytes)
        self.write(f"{device}/mem_info_gtt_total", card.gtt_bytes)
        self.write(f"{device}/mem_info_gtt_used", card.gtt_used_bytes)
        self.write(f"{device}/gpu_busy_percent", 0)
        self.write(f"{device}/vbios_version", f"113-MADE-{card.device:04X}")
        self.write(f"{device}/fw_version/mec_fw_version", "0x00000b1f")
        self.write(f"{device}/fw_version/mes_fw_version", "0x00000083")
        self.write(f"{device}/iommu_group/type", card.iommu)
        self.write(f"{device}/hwmon/hwmon{minor - 125}/name", "amdgpu")
        self.write(f"{device}/hwmon/hwmon{minor - 125}/temp1_input", 41000)
        if card.power_cap_watts is not None:  # a card; an APU has neither a cap nor a memory controller of its own
            self.write(f"{device}/mem_busy_percent", 0)
            self.write(f"{device}/unique_id", f"{0x5A5A00000000 + minor:016x}")
            self.write(f"{device}/hwmon/hwmon{minor - 125}/power1_cap", card.power_cap_watts * 1_000_000)
            self.write(f"{device}/hwmon/hwmon{minor - 125}/power1_cap_default", card.power_cap_watts * 1_000_000)
        if card.sensors is not None:
            self._sensors(card, device, f"{device}/hwmon/hwmon{minor - 125}")
        self.write(f"{device}/drm/card{card.card}/dev", f"226:{card.card}")
        self.link(f"{device}/drm/card{card.card}/device", f"../../../{card.address}")
        self.write(f"{device}/drm/renderD{minor}/dev", f"226:{minor}")
        self.link(f"sys/class/drm/card{card.card}", f"../../../{device}/drm/card{card.card}")
        self.link(f"sys/bus/pci/devices/{card.address}", f"../../../../{device}")
        self.write(f"dev/dri/renderD{minor}")

    def _kfd_node(self, card: Card, number: int, minor: int) -> None:
        domain, bus, _ = card.address.split(":")
        self.write(
            f"{KFD}/{number}/properties",
            "cpu_cores_count 0",
            f"simd_count {card.simds}",
            "simd_per_cu 2",
            "mem_banks_count 1",
            f"gfx_target_version {card.target_version}",
            "vendor_id 4098",
            f"device_id {card.device}",
            f"location_id {int(bus, 16) << 8}",
            f"domain {int(domain, 16)}",
            f"drm_render_minor {minor}",
            "local_mem_size 0",
        )
        if card.sensors is not None:
            heap, size = (0, card.gtt_bytes) if card.sensors == "apu" else (1, card.vram_bytes)
            bank = f"heap_type {heap}", f"size_in_bytes {size}", "flags 0", "width 256", "mem_clk_max 1258"
            self.write(f"{KFD}/{number}/mem_banks/0/properties", *bank)
            self.write(f"{KFD}/{number}/gpu_id", 40000 + number)
            self.write(f"sys/class/kfd/kfd/proc/4321/vram_{40000 + number}", 32 * MIB)

    def _sensors(self, card: Card, device: str, hwmon: str) -> None:
        """Write what the exporter reads beyond the probe."""
        apu = card.sensors == "apu"
        levels = APU_LEVELS if apu else CARD_LEVELS
        for clock, (megahertz, active) in levels.items():
            lines = (f"{n}: {mhz}Mhz {'*' if n == active else ''}" for n, mhz in enumerate(megahertz))
            self.write(f"{device}/pp_dpm_{clock}", *lines)
        self.write(f"{device}/power_dpm_force_performance_level", "auto")
        self.write(f"{device}/mem_info_vis_vram_used", card.vram_used_bytes)
        (self.root / device / "gpu_metrics").write_bytes(apu_metrics() if apu else card_metrics())
        self.write(f"{hwmon}/power1_label", "PPT")
        self.write(f"{hwmon}/power1_average", (11 if apu else 24) * 1_000_000)
        self.write(f"{hwmon}/freq1_input", (600 if apu else 30) * 1_000_000)
        self.write(f"{hwmon}/freq1_label", "sclk")
        self.write(f"{hwmon}/in0_input", 731)
        self.write(f"{hwmon}/in0_label", "vddgfx")
        self.write(f"{hwmon}/temp1_label", "edge")
        if apu:
            return
        for number, (label, celsius, critical) in enumerate(
            (("edge", 41, 100), ("junction", 44, 110), ("mem", 52, 108))
        ):
            sensor = f"{hwmon}/temp{number + 1}"
            self.write(f"{sensor}_label", label)
            self.write(f"{sensor}_input", celsius * 1000)
            self.write(f"{sensor}_crit", critical * 1000)
            self.write(f"{sensor}_emergency", (critical + 5) * 1000)
        self.write(f"{hwmon}/power1_cap_max", 300 * 1_000_000)
        self.write(f"{hwmon}/power1_cap_min", 210 * 1_000_000)
        self.write(f"{hwmon}/freq2_input", 96 * 1_000_000)
        self.write(f"{hwmon}/freq2_label", "mclk")
        self.write(f"{hwmon}/fan1_input", 1030)
        self.write(f"{hwmon}/fan1_max", 6000)
        self.write(f"{hwmon}/fan1_target", 1030)
        self.write(f"{hwmon}/pwm1", 51)


# MHz of each level, and the active one; an APU's clock between two levels has no active one (smu_v14_0_0_ppt.c).
CARD_LEVELS = {
    "sclk": ((500, 30, 2920), 1),
    "mclk": ((96, 456, 772, 1258), 0),
    "fclk": ((300, 1250, 2500), 0),
    "socclk": ((500, 1200), 0),
}
APU_LEVELS = {
    "sclk": ((600, 1100, 2900), 0),
    "mclk": ((400, 800, 1000), None),
    "fclk": ((1400, 1800, 2000), 0),
    "socclk": ((400, 1250), None),
}


def card_metrics(throttle_bits: int = 0) -> bytes:
    """gpu_metrics_v1_3 in the kernel's order; all ones where smu_v14_0_2_ppt.c writes nothing."""
    ones16, ones32, ones64 = 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
    header = struct.pack("<HBB", 120, 1, 3)
    temperatures = struct.pack("<6H", 41, 44, 52, 43, 42, 50)  # edge, hotspot, mem, VR of gfx, soc, mem
    activity = struct.pack("<3H", 0, 0, 0)
    power = struct.pack("<HQ", 24, ones64)  # W, energy
    clock = struct.pack("<Q", 123_456_789_000)  # ns since boot
    average = struct.pack("<7H", 30, 500, 96, *[ones16] * 4)  # MHz: gfx, soc, u, v and d twice
    current = struct.pack("<7H", 30, 500, 96, *[ones16] * 4)
    status = struct.pack("<IHHHH", 0, 1030, 16, 320, ones16)  # bits of this chip, rpm, PCIe lanes, 0.1 GT/s
    accumulated = struct.pack("<2I4HQ", ones32, ones32, *[ones16] * 4, ones64)
    voltages = struct.pack("<4H", 731, 720, ones16, ones16)
    table = header + temperatures + activity + power + clock + average + current + status + accumulated + voltages
    return table + struct.pack("<Q", throttle_bits)


def apu_metrics(residencies: tuple[int, ...] = (0, 0, 1200, 34, 0, 0, 0)) -> bytes:
    """gpu_metrics_v3_0 in the kernel's order and natural alignment; all ones where nothing is written."""
    ones16 = 0xFFFF
    header = struct.pack("<HBB", 264, 3, 0)
    temperatures = struct.pack("<19H", 3900, 4100, *[4000] * 16, 3600)  # 1/100 °C: gfx, soc, cores, skin
    activity = struct.pack("<26H", 0, 0, *[0] * 8, *[100] * 16)  # gfx, vcn, 8 columns of the NPU, cores
    bandwidth = struct.pack("<4Hxx", 812, 340, 0, 0)  # MB/s: memory reads and writes, the NPU's
    clock = struct.pack("<Q", 123_456_789_000)
    power = struct.pack("<IHxx4I", 11_250, 0, 10_500, 1_500, 0, 4_000)  # mW: socket, NPU, APU, gfx, dGPU, cores
    per_core = struct.pack("<16H", *[250] * 16)
    system = struct.pack("<3H", ones16, ones16, ones16)
    clocks = struct.pack("<8H", 600, 500, 800, 0, 1400, 400, 600, 0)  # MHz: gfx, soc, vpe, npu, f, v, u, mpnpu
    cores = struct.pack("<16H2Hxx", *[3000] * 16, 5187, 2900)
    return (
        header + temperatures + activity + bandwidth + clock + power + per_core + system + clocks + cores
        + struct.pack("<7IIxxxx", *residencies, 0)
    )  # fmt: skip


EPYC_KIB = 131_735_552  # 128 GiB of modules, less what firmware and kernel keep: assumed
RYZEN_KIB = 63_963_136  # 64 GiB of modules
STRIX_KIB = 131_072_000  # 128 GiB of modules with the smallest carve-out: 125 GiB
CARVED_KIB = 31_457_280  # the same with 96 GiB carved out: about 30 GiB
# 32 GiB less 144 MiB that firmware keeps: an assumption, the lower end of what is told of cards with Navi 48.
R9700_VRAM = 32624 * MIB


def behind_a_switch(root: str, first_bus: int, slot: tuple[str, int]) -> dict[str, tuple]:
    """A Radeon's PCI path: root port, the card's own switch (two levels), the GPU; only the slot's link is real."""
    buses = [f"{root[:5]}{first_bus + step:02x}:00.0" for step in range(3)]
    return {"path": (root, *buses), "links": (slot, slot, ("32.0", 16), ("32.0", 16))}


def r9700(card: int, gtt_bytes: int, **position: object) -> Card:
    sizes = {"vram_bytes": R9700_VRAM, "visible_bytes": R9700_VRAM, "gtt_bytes": gtt_bytes}
    return Card(card, device=0x7551, target_version=120001, simds=128, power_cap_watts=300, **sizes, **position)


def strix_halo(vram_bytes: int, gtt_bytes: int, used_bytes: int = 64 * MIB) -> Card:
    path = ("0000:00:08.1", "0000:c5:00.0")
    sizes = {"vram_bytes": vram_bytes, "visible_bytes": vram_bytes, "gtt_bytes": gtt_bytes}
    links = (("16.0", 16),) * 2
    return Card(1, path, links, 0x1586, 110501, 80, vram_used_bytes=used_bytes, iommu="DMA-FQ", sensors="apu", **sizes)


def make_quads(out: Path) -> None:
    roots = [f"0000:{bus:02x}:01.1" for bus in (0x00, 0x20, 0x40, 0x60)]
    places = [behind_a_switch(root, int(root[5:7], 16) + 1, ("16.0", 16)) for root in roots]
    tree = Tree(
        out / "quad-r9700",
        "Four Radeon AI PRO R9700 (0x7551) in a PCIe 4.0 server with one CPU of 32 threads and 128 GiB.\n"
        f"Assumed: 32624 MiB of each card's 32 GiB are usable; firmware and versions are invented.{SOURCES.rstrip()}"
        + TELEMETRY_SOURCES,
    )
    tree.host(EPYC_KIB, 125_829_120, 32, "6.18.7", "iommu=pt")
    tree.amd(
        *(r9700(n, EPYC_KIB * 512, numa_node=0, sensors="card", **place) for n, place in enumerate(places)),
        pages_limit=EPYC_KIB // 8,
        cpus=32,
    )
    tree.write("opt/rocm/.info/version", "7.2.1")
    tree.write("opt/rocm/lib/librccl.so.1.0.70201")
    tree = Tree(
        out / "quad-48gb",
        "Four Radeon PRO W7900 (0x7448, 48 GiB less 16 MiB, assumed) in the same server as quad-r9700, with 256 GiB."
        + SOURCES,
    )
    tree.host(2 * EPYC_KIB, 251_658_240, 32, "6.18.7", "iommu=pt")
    vram = 48 * GIB - 16 * MIB
    tree.amd(
        *(
            Card(n, device=0x7448, target_version=110000, simds=192, vram_bytes=vram, visible_bytes=vram,
                 gtt_bytes=EPYC_KIB * 1024, numa_node=0, power_cap_watts=241, **place)
            for n, place in enumerate(places)
        ),
        pages_limit=EPYC_KIB // 4,
        cpus=32,
    )  # fmt: skip


def make_desktops(out: Path) -> None:
    slot = behind_a_switch("0000:00:01.1", 1, ("16.0", 8))
    tree = Tree(out / "single-r9700", f"One Radeon AI PRO R9700 in a slot of 8 lanes, a desktop with 64 GiB.{SOURCES}")
    tree.host(RYZEN_KIB, 58_720_256, 24, "6.18.7")
    tree.amd(r9700(1, RYZEN_KIB * 512, iommu="DMA-FQ", **slot), pages_limit=RYZEN_KIB // 8, cpus=24)
    tree = Tree(
        out / "r9700-plus-igpu",
        f"One Radeon AI PRO R9700 and the GPU of a desktop Ryzen (0x164e, gfx1036, 2 compute units), 64 GiB.{SOURCES}",
    )
    tree.host(RYZEN_KIB, 58_720_256, 24, "6.18.7")
    slot = behind_a_switch("0000:00:01.1", 1, ("32.0", 16))
    small = {"vram_bytes": 512 * MIB, "visible_bytes": 512 * MIB, "gtt_bytes": RYZEN_KIB * 512}
    igpu = Card(2, ("0000:00:08.1", "0000:0f:00.0"), (("16.0", 16),) * 2, 0x164E, 100306, 4, iommu="DMA-FQ", **small)
    discrete = r9700(1, RYZEN_KIB * 512, iommu="DMA-FQ", **slot)
    tree.amd(discrete, igpu, pages_limit=RYZEN_KIB // 8, cpus=24)
    tree.write("opt/rocm/.info/version", "7.2.1")
    tree.write("opt/rocm/lib/librccl.so.1.0.70201")


def make_strix_halos(out: Path) -> None:
    def box(name: str, origin: str, total_kib: int, available_kib: int, card: Card, pages: int) -> Tree:
        tree = Tree(
            out / name,
            f"Ryzen AI Max+ 395 (Strix Halo, 0x1586), 128 GiB of modules. {origin}{SOURCES.rstrip()}"
            + TELEMETRY_SOURCES,
        )
        tree.host(total_kib, available_kib, 32, "6.18.7")
        tree.amd(card, pages_limit=pages, cpus=32)
        return tree

    half, large = STRIX_KIB * 512, 120 * GIB
    available = 126_877_696
    default = (
        "Firmware's smallest carve-out; GTT is the driver's default, half of the memory: too little for the model."
    )
    box("strix-halo-128-default", default, STRIX_KIB, available, strix_halo(512 * MIB, half), half // 4096)
    raised = "As `amd-ttm --set 120` leaves it: the TTM limit and with it GTT are 120 GiB."
    box("strix-halo-128-gtt120", raised, STRIX_KIB, available, strix_halo(512 * MIB, large), large // 4096)
    carved = "Firmware carved out 96 GiB for the GPU; Linux is left about 30 GiB, half of which may be GTT."
    card = strix_halo(96 * GIB, CARVED_KIB * 512)
    box("strix-halo-128-carveout96", carved, CARVED_KIB, 28_311_552, card, CARVED_KIB // 8)
    held = (
        "The same box as strix-halo-128-gtt120, from an LXC container limited to 64 GiB that sees the host's meminfo."
    )
    tree = box("strix-halo-lxc", held, STRIX_KIB, available, strix_halo(512 * MIB, large), large // 4096)
    tree.write("run/systemd/container", "lxc")
    tree.write("proc/self/cgroup", "0::/")
    tree.write("sys/fs/cgroup/cgroup.controllers", "cpu memory")
    tree.write("sys/fs/cgroup/memory.max", 64 * GIB)
    tree.write("sys/fs/cgroup/memory.current", 4 * GIB)
    tree.write("sys/fs/cgroup/memory.stat", f"anon {GIB}", f"inactive_file {2 * GIB}")


def make_nvidia_boxes(out: Path) -> None:
    nothing = ", [N/A]" * 7  # memory.total and .used, power.limit, the four figures of the PCIe link
    spark = ("DGX Spark", "0000000F:01:00.0, 0x2E1210DE, NVIDIA GB10", "12.1", 125_513_868, "6.14.0-1013-nvidia")
    thor = ("Jetson AGX Thor", "00000000:01:00.0, 0x2B0010DE, NVIDIA Thor", "11.0", 128_773_792, "6.8.12-tegra")
    boxes = {"dgx-spark": spark, "jetson-thor": thor}
    for number, (name, (title, device, capability, total_kib, release)) in enumerate(boxes.items()):
        tree = Tree(
            out / name, f"{title}, 128 GB shared by CPU and GPU; usable size and versions assumed.{NVIDIA_SOURCES}"
        )
        tree.host(total_kib, total_kib - 4_194_304, 20 - 6 * number, release)
        uuid = f"GPU-00000000-0000-0000-0000-00000000000{number}"
        driver = ("580.95.05", "580.00")[number]
        tree.write("commands/nvidia-smi.csv", f"{device}, {uuid}, {capability}{nothing}, {driver}, [N/A]")
        for node in ("nvidia0", "nvidiactl", "nvidia-uvm"):
            tree.write(f"dev/{node}")


def make_all(out: Path) -> None:
    make_quads(out)
    make_desktops(out)
    make_strix_halos(out)
    make_nvidia_boxes(out)


if __name__ == "__main__":
    make_all(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
