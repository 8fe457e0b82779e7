"""What a plan may use: the budget of the pool that holds the model, and of the host's memory beside it."""

from dataclasses import dataclass

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import Gpu, Hardware
from step128_launcher.planning.plan import Limits
from step128_launcher.planning.pools import device_memory
from step128_launcher.planning.profiles import Profile, matching_gpus
from step128_launcher.sizes import format_bytes

HOST_MEMORY = "host memory"


@dataclass(frozen=True)
class Budget:
    """Bytes of the model's pool (each GPU; the host on a CPU), and of the host's (None: it is the same pool).

    `shared`: the model's pool is host memory too, so the host's budget must hold both.
    """

    what: str
    gpus: tuple[Gpu, ...]
    total_bytes: int
    available_bytes: int
    budget_bytes: int
    host_available_bytes: int | None
    host_budget_bytes: int | None
    shared: bool

    def where(self, ranks: int) -> str:
        """Return what to call the model's pool for people."""
        return f"each of {ranks} GPUs" if ranks > 1 and self.gpus else self.what

    def left_bytes(self, fixed_bytes: int, host_bytes: int) -> int:
        """Return what is left for the KV cache beside `fixed_bytes` in the pool and `host_bytes` of processes."""
        left = self.budget_bytes - fixed_bytes
        if self.host_budget_bytes is None:
            return left
        if self.shared:
            return min(left, self.host_budget_bytes - host_bytes - fixed_bytes)
        # On separate memories the host's processes either fit or they do not.
        return left if host_bytes <= self.host_budget_bytes else min(left, self.host_budget_bytes - host_bytes)

    def lacking(self, pool_bytes: int, host_bytes: int, ranks: int) -> str:
        """Return which of the two budgets `pool_bytes` of the model and `host_bytes` of processes exceed by more."""
        if self.host_budget_bytes is None:
            return self.where(ranks)
        host_over = host_bytes + (pool_bytes if self.shared else 0) - self.host_budget_bytes
        return HOST_MEMORY if host_over > max(0, pool_bytes - self.budget_bytes) else self.where(ranks)


def make_budget(hardware: Hardware, profile: Profile, limits: Limits) -> Budget:
    """Return the budgets on this machine.

    Raises:
        LauncherError: 4, if the profile is for GPUs and the machine has none of them, or does not tell their memory.

    """
    available = hardware.memory_available_bytes
    if profile.device == "cpu":
        share = int(available * profile.usable_fraction)
        budget = share if limits.memory_bytes is None else limits.memory_bytes
        return Budget(HOST_MEMORY, (), hardware.memory_total_bytes, available, budget, None, None, False)
    gpus = matching_gpus(profile, hardware)
    if not gpus:
        raise LauncherError(
            ExitCode.UNSUPPORTED_HARDWARE,
            f"Profile {profile.name} is for {' or '.join(profile.match_targets)}, and no such GPU can be used here.",
            "See what there is: step128 doctor; which profiles fit: step128 profiles.",
        )
    memories = [device_memory(hardware, gpu) for gpu in gpus]
    # Ranks are alike, so the GPU with the least decides for all.
    total, free = min(memory.total_bytes for memory in memories), min(memory.free_bytes for memory in memories)
    if not total:
        raise LauncherError(
            ExitCode.UNSUPPORTED_HARDWARE,
            f"The memory of {gpus[0].name} cannot be read.",
            "; ".join(hardware.unreadable) or "step128 doctor says what could not be read.",
        )
    share = min(int(total * profile.usable_fraction), free)
    return Budget(
        what=f"the GPU's {memories[0].what}",
        gpus=gpus,
        total_bytes=total,
        available_bytes=free,
        budget_bytes=share if limits.memory_bytes is None else limits.memory_bytes,
        host_available_bytes=available,
        host_budget_bytes=int(available * profile.host_usable_fraction),
        shared=any(memory.unified for memory in memories),
    )


def memory_shortage(budget: Budget, memory_bytes: int | None) -> str | None:
    """Return what is wrong with a budget (--memory) that this machine cannot give, or None."""
    available = budget.available_bytes
    if memory_bytes is None or memory_bytes <= available:
        return None
    return f"--memory {format_bytes(memory_bytes)} is above the {format_bytes(available)} available ({budget.what})."
