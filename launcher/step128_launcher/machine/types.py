"""What the probe finds: frozen dataclasses, every figure None where the machine does not tell it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

AMD, NVIDIA = "amd", "nvidia"


@dataclass(frozen=True)
class PcieLink:
    """A PCIe link as negotiated, and the best both ends can do; GT/s a lane, and lanes."""

    speed_gts: float
    width: int
    max_speed_gts: float | None
    max_width: int | None


@dataclass(frozen=True)
class Gpu:
    """One GPU; the order of a machine's GPUs is that of their PCI addresses.

    `integrated` GPUs have no memory of their own: theirs is the host's. `vram_*` then is only a carve-out that the
    firmware took from it (AMD), or absent (NVIDIA); `gtt_*` is host memory that the driver lets the GPU use.
    `visible_vram_bytes` is what the CPU can reach through the PCIe BAR. `visible` is False for a GPU that
    HIP_, ROCR_ or CUDA_VISIBLE_DEVICES hides from a process started here. `kfd_node` is its place in the compute
    driver's order, which HIP's indices follow; `unique_id` what a GPU-… identifier holds; `iommu_domain` the type of
    its IOMMU domain ("identity", "DMA-FQ").
    """

    vendor: str
    pci_address: str
    pci_id: str
    name: str
    target: str | None
    compute_units: int | None
    integrated: bool
    vram_total_bytes: int | None = None
    vram_used_bytes: int | None = None
    visible_vram_bytes: int | None = None
    gtt_total_bytes: int | None = None
    gtt_used_bytes: int | None = None
    link: PcieLink | None = None
    numa_node: int | None = None
    power_cap_watts: float | None = None
    render_node: str | None = None
    visible: bool = True
    kfd_node: int | None = None
    unique_id: str | None = None
    iommu_domain: str | None = None


@dataclass(frozen=True)
class TtmLimit:
    """`/sys/module/MODULE/parameters/pages_limit`: host memory that GPUs may pin, for `ttm` or the DKMS `amdttm`."""

    module: str
    limit_bytes: int


@dataclass(frozen=True)
class DeviceNode:
    """A node below /dev that a GPU runtime opens; `accessible` means readable and writable by this process."""

    path: str
    group_id: int
    accessible: bool


@dataclass(frozen=True)
class Hardware:
    """One machine as this process may use it.

    `memory_available_bytes` is what can be used now without swapping, within the cgroup's limit. `unreadable` names
    each file or tool that was there and could not be read, with the reason; it never stops the probe.
    """

    cpu_ids: tuple[int, ...]
    cpu_quota: float | None
    memory_total_bytes: int
    memory_available_bytes: int
    cgroup_limit_bytes: int | None
    cgroup_version: int | None
    has_amd_gpu: bool
    has_nvidia_gpu: bool
    gpus: tuple[Gpu, ...] = ()
    ttm_limits: tuple[TtmLimit, ...] = ()
    swap_total_bytes: int = 0
    swap_free_bytes: int = 0
    shm_bytes: int | None = None
    kernel_release: str | None = None
    kernel_command_line: str | None = None
    firmware: Mapping[str, str] = field(default_factory=dict)
    container: str | None = None
    device_nodes: tuple[DeviceNode, ...] = ()
    groups: tuple[int, ...] = ()
    visible_devices: Mapping[str, str] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()

    @property
    def has_gpu(self) -> bool:
        """Whether a GPU driver's device node is there."""
        return self.has_amd_gpu or self.has_nvidia_gpu

    @property
    def usable_cpus(self) -> float:
        """CPUs this process may keep busy: its affinity, lowered by the cgroup's quota."""
        return min(float(len(self.cpu_ids)), self.cpu_quota or float("inf"))

    @property
    def usable_gpus(self) -> tuple[Gpu, ...]:
        """GPUs that a process started here would see."""
        return tuple(gpu for gpu in self.gpus if gpu.visible)
