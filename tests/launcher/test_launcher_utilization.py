"""--gpu-memory-utilization against vLLM's own check at the start, however much of the memory others hold."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from step128_launcher.machine.types import Hardware
from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.planning.plan import DoesNotFitError, Limits, Plan
from step128_launcher.planning.planner import make_plan
from step128_launcher.planning.pools import device_memory
from step128_launcher.planning.profiles import Profile

MIB = 2**20


def starts(plan: Plan, hardware: Hardware, utilization: float) -> bool:
    """vLLM's request_memory (v1/worker/utils.py): what is free beside runtime and collectives must hold the share."""
    host = plan.host_memory
    free = min(device_memory(hardware, gpu).free_bytes for gpu in hardware.gpus) - plan.expected.non_torch_bytes
    if host is not None and any(line.name == "model and KV cache" for line in host.lines):
        free -= sum(line.total_bytes for line in host.lines if line.name != "model and KV cache")
    return free >= math.ceil(plan.memory.total_memory_bytes * utilization)


@pytest.mark.parametrize("used_mib", range(0, 3000, 200))
@pytest.mark.parametrize("machine", ["quad-r9700", "quad-48gb"])
def test_cards_with_other_users(
    machine: str,
    used_mib: int,
    recorded: Callable[[str], Hardware],
    profile_of: Callable[[str], Profile],
    real_model: Callable[[str | None], ModelFootprint],
) -> None:
    hardware = recorded(machine)
    hardware = replace(hardware, gpus=tuple(replace(gpu, vram_used_bytes=used_mib * MIB) for gpu in hardware.gpus))
    try:
        plan = make_plan(hardware, real_model("all-linears"), profile_of(machine), Limits())
    except DoesNotFitError:
        return
    for utilization in (plan.gpu_memory_utilization, plan.measuring_utilization):
        assert utilization is not None and starts(plan, hardware, utilization)
    # Not needlessly low either: with it vLLM's own sizing must find the KV cache.
    unused = plan.memory.budget_bytes - plan.memory.total_memory_bytes * (plan.measuring_utilization or 0)
    assert unused <= plan.expected.non_torch_bytes + 0.021 * plan.memory.total_memory_bytes


@pytest.mark.parametrize("machine", ["strix-halo-128-gtt120", "dgx-spark", "jetson-thor"])
def test_unified_machines(
    machine: str,
    recorded: Callable[[str], Hardware],
    profile_of: Callable[[str], Profile],
    real_model: Callable[[str | None], ModelFootprint],
) -> None:
    hardware = recorded(machine)
    profile = profile_of("strix-halo-128" if machine.startswith("strix") else machine)
    plan = make_plan(hardware, real_model("all-linears"), profile, Limits())
    for utilization in (plan.gpu_memory_utilization, plan.measuring_utilization):
        assert utilization is not None and starts(plan, hardware, utilization)
