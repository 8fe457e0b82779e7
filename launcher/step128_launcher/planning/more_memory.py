"""Where missing memory could come from on this machine, with the command where there is one."""

from step128_launcher.machine.types import AMD, Hardware
from step128_launcher.planning.budget import Budget
from step128_launcher.planning.plan import Limits
from step128_launcher.planning.pools import LARGE_CARVE_OUT_BYTES, gtt_goal_bytes, ttm_command
from step128_launcher.planning.profiles import Profile
from step128_launcher.sizes import format_bytes

_MIB, _GIB = 2**20, 2**30


def more_memory(
    hardware: Hardware, limits: Limits, profile: Profile, budget: Budget, missing_bytes: int, host_lacks: bool
) -> list[str]:
    """Return where the memory could come from. Of what is freed or added a plan uses the profile's share only."""
    gpu = budget.gpus[0] if budget.gpus else None
    if limits.memory_bytes is not None and limits.memory_bytes < budget.available_bytes:
        return ["raise --memory"]
    total, limit = hardware.memory_total_bytes, hardware.cgroup_limit_bytes
    share = profile.usable_fraction if gpu is None else profile.host_usable_fraction
    added = -(-int(missing_bytes / share) // _MIB) * _MIB
    confined = limit is not None and limit < total
    if (host_lacks or gpu is None or budget.shared) and limit is not None and confined and limit + added <= total:
        counted = (
            " (a GPU's share may not count against it; it is counted here as a precaution)" if budget.shared else ""
        )
        return [f"raise the container's memory limit (now {format_bytes(limit)}) by {format_bytes(added)}{counted}"]
    if host_lacks or gpu is None:
        if not confined and added <= total - hardware.memory_available_bytes:
            return ["free memory on this machine"]
        return [f"a machine with more memory (this one has {format_bytes(total)})"]
    if gpu.integrated and gpu.vendor == AMD:
        return [gtt_remedy(hardware, profile, budget, missing_bytes)]
    emptied = int(budget.total_bytes * profile.usable_fraction)
    taken = budget.total_bytes - budget.available_bytes
    if emptied - budget.budget_bytes >= missing_bytes:
        return [f"end what holds {format_bytes(taken)} of the GPU's memory"]
    more = format_bytes(missing_bytes)
    return [f"GPUs with more memory ({more} missing), more of them, or a checkpoint with fewer experts"]


def gtt_remedy(hardware: Hardware, profile: Profile, budget: Budget, missing_bytes: int) -> str:
    """Return how to let an AMD APU use more of the host's memory, or why that will not help."""
    gpu = budget.gpus[0]
    vram, goal_bytes = gpu.vram_total_bytes or 0, gtt_goal_bytes(hardware, gpu)
    goal = goal_bytes // _GIB
    wanted = -(-int(budget.total_bytes + missing_bytes / profile.usable_fraction) // _GIB)
    if wanted > goal:
        return f"a machine with more memory: {wanted} GiB for the GPU are needed, this one can give {goal} GiB"
    steps = f"raise GTT to {goal} GiB: {ttm_command(goal_bytes)}, then reboot"
    if vram > LARGE_CARVE_OUT_BYTES:
        steps = f"in the firmware set the GPU's carve-out to 512 MiB (now {format_bytes(vram)}), then {steps}"
    return steps
