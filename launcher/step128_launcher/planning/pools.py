"""The memory a server may use: of each GPU, and of the host; on unified machines both are the same memory.

AMD: a discrete GPU has its VRAM. An integrated one takes its allocations from GTT, host memory that the driver lets it
use, when GTT is larger than the carve-out, else from the carve-out (Linux commit 759e764); never from both, so they are
not added. GTT is bounded by GTT's own size, by TTM's pages_limit and by the memory the host has left. HIP's own
"total" is no help there (it may count none of these). NVIDIA: an integrated GPU uses the host's memory.
"""

from dataclasses import dataclass

from step128_launcher.machine.types import NVIDIA, Gpu, Hardware


@dataclass(frozen=True)
class DeviceMemory:
    """One GPU's memory: what there is and what is free now; `unified` if it is taken from the host's."""

    total_bytes: int
    free_bytes: int
    unified: bool
    what: str


def device_memory(hardware: Hardware, gpu: Gpu) -> DeviceMemory:
    """Return what one GPU can allocate; 0 where the machine does not tell."""
    vram = gpu.vram_total_bytes or 0
    if not gpu.integrated:
        return DeviceMemory(vram, max(0, vram - (gpu.vram_used_bytes or 0)), False, "VRAM")
    if gpu.vendor == NVIDIA:
        total = hardware.memory_total_bytes
        return DeviceMemory(total, hardware.memory_available_bytes, True, "share of host memory")
    gtt = gpu.gtt_total_bytes or 0
    if vram >= gtt:
        return DeviceMemory(vram, max(0, vram - (gpu.vram_used_bytes or 0)), False, "carve-out")
    limits = [gtt, *(limit.limit_bytes for limit in hardware.ttm_limits), hardware.memory_total_bytes]
    total = min(limits)
    free = min(max(0, total - (gpu.gtt_used_bytes or 0)), hardware.memory_available_bytes)
    return DeviceMemory(total, free, True, "GTT")


# Left for Linux and the server's processes, of what the firmware leaves of the memory (a 128 GB box shows Linux about
# 125 GiB); and the most that was reported to work there. Assumptions.
_HOST_SHARE_BYTES, _MOST_GTT_BYTES = 5 * 2**30, 120 * 2**30

# A carve-out above this is worth giving back to the host: GTT serves the GPU as well.
LARGE_CARVE_OUT_BYTES = 4 * 2**30


def ttm_command(goal_bytes: int) -> str:
    """Return the command that lets AMD GPUs use `goal_bytes` of the host's memory, with the package it comes from."""
    return f"`sudo amd-ttm --set {goal_bytes // 2**30}` (package amd-debug-tools)"


def gtt_goal_bytes(hardware: Hardware, gpu: Gpu) -> int:
    """Return the GTT to set on an AMD APU: all of the memory but 5 GiB, at most 120 GiB, in whole GiB."""
    physical = hardware.memory_total_bytes + (gpu.vram_total_bytes or 0)
    return min(physical - _HOST_SHARE_BYTES, _MOST_GTT_BYTES) // 2**30 * 2**30
