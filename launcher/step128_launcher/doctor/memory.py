"""Machines whose GPU shares the host's memory: what the firmware, the driver and the container leave the GPU."""

from step128_launcher.doctor.context import Context, why_no_apu
from step128_launcher.doctor.finding import Finding, passed, skipped, warned
from step128_launcher.machine.types import Gpu
from step128_launcher.planning.pools import LARGE_CARVE_OUT_BYTES, gtt_goal_bytes, ttm_command
from step128_launcher.sizes import format_bytes

_GIB = 2**30
# A GTT of this share of the goal is as good as the goal: somebody has set it.
_NEAR_GOAL = 0.95


def check_carve_out(context: Context) -> Finding:
    """A carve-out is lost to Linux for good, and the driver allocates from it or from GTT, never from both."""
    name = "carve-out"
    gpu = _unified(context)
    if gpu is None:
        return skipped(name, why_no_apu(context))
    if gpu.vram_total_bytes is None:
        return skipped(name, "the driver does not tell the carve-out's size")
    size = format_bytes(gpu.vram_total_bytes)
    if gpu.vram_total_bytes <= LARGE_CARVE_OUT_BYTES:
        return passed(name, f"{size} for the GPU alone; the rest is shared")
    return warned(
        name,
        f"the firmware keeps {size} for the GPU; Linux is left {format_bytes(context.hardware.memory_total_bytes)}, "
        "and weights pass through that on their way",
        "In the firmware setup set the UMA frame buffer to 512 MiB, then raise GTT: " + _ttm_commands(context, gpu),
    )


def check_gtt(context: Context) -> Finding:
    """By default the driver lets the GPU use half of the memory; the model needs more on any 128 GB box."""
    name = "gtt"
    gpu = _unified(context)
    if gpu is None:
        return skipped(name, why_no_apu(context))
    if gpu.gtt_total_bytes is None:
        return skipped(name, "the driver does not tell GTT's size")
    total = context.hardware.memory_total_bytes
    shown = f"GTT {format_bytes(gpu.gtt_total_bytes)} of {format_bytes(total)} memory"
    if (gpu.vram_total_bytes or 0) >= gpu.gtt_total_bytes:
        return skipped(name, f"{shown}; not used, the carve-out is larger")
    if gpu.gtt_total_bytes > total:
        return warned(name, f"{shown}: more than there is, so the host runs out first", _ttm_commands(context, gpu))
    goal = gtt_goal_bytes(context.hardware, gpu)
    if gpu.gtt_total_bytes < _NEAR_GOAL * goal:
        evidence = f"{shown}; {format_bytes(goal)} can be given to the GPU (the driver's default is a half)"
        return warned(name, evidence, _ttm_commands(context, gpu))
    return passed(name, shown)


def check_ttm(context: Context) -> Finding:
    """Pages the GPU may pin are limited by the TTM module in use: `ttm`, or `amdttm` with AMD's driver package."""
    name = "ttm-limit"
    gpu = _unified(context)
    if gpu is None:
        return skipped(name, why_no_apu(context))
    limits = context.hardware.ttm_limits
    if not limits or gpu.gtt_total_bytes is None:
        return skipped(name, "no TTM module tells its pages_limit")
    shown = ", ".join(f"{limit.module} {format_bytes(limit.limit_bytes)}" for limit in limits)
    words = (context.hardware.kernel_command_line or "").split()
    old = [word for word in words if word.startswith("amdgpu.gttsize=")]
    if old and any("pages_limit=" in word for word in words):
        return warned(
            name,
            f"{old[0]} and pages_limit are both on the kernel's command line",
            "Remove amdgpu.gttsize: pages_limit alone sets both, and HIP misreports free memory with gttsize.",
        )
    if len({limit.limit_bytes for limit in limits}) > 1:
        remedy = "Set both modules, or only the loaded one (`lsmod | grep ttm`): " + _ttm_commands(context, gpu)
        return warned(name, f"two TTM modules with different limits: {shown}; one of them is not in use", remedy)
    if limits[0].limit_bytes < gpu.gtt_total_bytes:
        return warned(
            name,
            f"{shown} is less than GTT's {format_bytes(gpu.gtt_total_bytes)}: allocations fail at the limit",
            _ttm_commands(context, gpu),
        )
    return passed(name, shown)


def check_container_limit(context: Context) -> Finding:
    """A container's memory limit binds the server's processes, while GPU allocations go past it to the host."""
    name = "container-memory"
    hardware = context.hardware
    if hardware.cgroup_limit_bytes is None or hardware.cgroup_limit_bytes >= hardware.memory_total_bytes:
        return passed(name, "no memory limit below the machine's memory")
    shown = f"limit {format_bytes(hardware.cgroup_limit_bytes)} of {format_bytes(hardware.memory_total_bytes)}"
    if not context.is_unified:
        return passed(name, f"{shown}; the plan keeps to it")
    return warned(
        name,
        f"{shown}: the kernel does not count the GPU's share of a unified memory against it, so it protects nothing, "
        "and the plan can use no more than it",
        "Remove the limit (lxc: delete lxc.cgroup2.memory.max; docker: no --memory), or plan with it on purpose.",
    )


def check_swap(context: Context) -> Finding:
    """Swapping while the GPU holds most of a unified memory slows every token, or ends in the OOM killer."""
    name = "swap"
    if not context.is_unified:
        return skipped(name, why_not_shared(context))
    used = context.hardware.swap_total_bytes - context.hardware.swap_free_bytes
    if used <= _GIB:
        return passed(name, f"{format_bytes(max(0, used))} in use")
    remedy = "Close other programs, then `sudo swapoff -a && sudo swapon -a`, before the server starts."
    return warned(name, f"{format_bytes(used)} are swapped out already", remedy)


def _unified(context: Context) -> Gpu | None:
    """Return the integrated AMD GPU that would serve."""
    return next((gpu for gpu in context.amd if gpu.integrated), None) if context.is_unified else None


def why_not_shared(context: Context) -> str:
    """Return why a check of memory that host and GPU share does not apply."""
    usable = context.hardware.usable_gpus
    return "the GPU that would serve has memory of its own" if usable else "no usable GPU"


def _ttm_commands(context: Context, gpu: Gpu) -> str:
    """Return how to raise the limit: amd-debug-tools' command, or the same by hand."""
    goal = gtt_goal_bytes(context.hardware, gpu)
    modules = [limit.module for limit in context.hardware.ttm_limits] or ["ttm"]
    lines = "; ".join(f"options {module} pages_limit={goal // 4096}" for module in modules)
    return (
        f"{ttm_command(goal)} and reboot; or by hand: write '{lines}' to "
        "/etc/modprobe.d/ttm.conf, rebuild the initramfs (`sudo update-initramfs -u`, or `sudo dracut -f`), reboot."
    )
