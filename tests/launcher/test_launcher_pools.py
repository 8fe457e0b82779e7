"""How much one GPU may take, of its own memory or of the host's; and what the two budgets leave."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import AMD, NVIDIA, Gpu, Hardware, TtmLimit
from step128_launcher.planning.budget import HOST_MEMORY, Budget, make_budget
from step128_launcher.planning.plan import Limits
from step128_launcher.planning.pools import DeviceMemory, device_memory
from step128_launcher.planning.profiles import Profile

GIB = 2**30
# 125 GiB of host memory, 121 GiB of it available.
HOST = Hardware((0, 1), None, 125 * GIB, 121 * GIB, None, None, True, False)
APU = Gpu(AMD, "0000:c5:00.0", "1002:1586", "Strix Halo", "gfx1151", 40, True, vram_total_bytes=GIB // 2)
CARD = Gpu(AMD, "0000:03:00.0", "1002:7551", "R9700", "gfx1201", 64, False, 32 * GIB, 2 * GIB)


@pytest.mark.parametrize(
    ("gtt", "ttm", "available", "total", "free"),
    [
        (62, [], 121, 62, 61),  # GTT itself
        (120, [], 121, 120, 119),
        (120, [100], 121, 100, 99),  # TTM's limit below it
        (120, [124, 90], 121, 90, 89),  # the lesser of two modules
        (200, [200], 121, 125, 121),  # the host's memory, and what is left of it
        (120, [], 60, 120, 60),
    ],
)
def test_an_apu_s_gtt(gtt: int, ttm: list[int], available: int, total: int, free: int) -> None:
    gpu = replace(APU, gtt_total_bytes=gtt * GIB, gtt_used_bytes=GIB)
    limits = tuple(TtmLimit(f"module{number}", limit * GIB) for number, limit in enumerate(ttm))
    hardware = replace(HOST, memory_available_bytes=available * GIB, ttm_limits=limits)
    assert device_memory(hardware, gpu) == DeviceMemory(total * GIB, free * GIB, True, "GTT")


def test_an_apu_uses_its_carve_out_or_gtt_never_both() -> None:
    gpu = replace(APU, vram_total_bytes=96 * GIB, vram_used_bytes=GIB, gtt_total_bytes=16 * GIB)
    assert device_memory(HOST, gpu) == DeviceMemory(96 * GIB, 95 * GIB, False, "carve-out")


def test_other_kinds() -> None:
    assert device_memory(HOST, CARD) == DeviceMemory(32 * GIB, 30 * GIB, False, "VRAM")
    spark = Gpu(NVIDIA, "000f:01:00.0", "10de:2e12", "GB10", "sm_121", 48, True)
    assert device_memory(HOST, spark) == DeviceMemory(125 * GIB, 121 * GIB, True, "share of host memory")
    assert device_memory(HOST, replace(CARD, vram_total_bytes=None)).total_bytes == 0


def test_the_smallest_card_decides(profile_of: Callable[[str], Profile]) -> None:
    small = replace(CARD, vram_total_bytes=31 * GIB, vram_used_bytes=0)
    busy = replace(CARD, vram_used_bytes=8 * GIB)
    hardware = replace(HOST, gpus=(CARD, small, busy, CARD))
    budget = make_budget(hardware, profile_of("quad-r9700"), Limits())
    assert (budget.total_bytes, budget.available_bytes) == (31 * GIB, 24 * GIB)
    assert budget.budget_bytes == 24 * GIB  # what is free, since that is less than 95 % of all
    assert not budget.shared and budget.host_budget_bytes == int(121 * GIB * 0.9)


def test_a_card_that_does_not_tell_its_memory(profile_of: Callable[[str], Profile]) -> None:
    hardware = replace(HOST, gpus=(replace(CARD, vram_total_bytes=None),), unreadable=("mem_info_vram_total: gone",))
    with pytest.raises(LauncherError, match="memory of R9700 cannot be read") as caught:
        make_budget(hardware, profile_of("single-r9700"), Limits())
    assert caught.value.exit_code == ExitCode.UNSUPPORTED_HARDWARE and "gone" in caught.value.hint


def test_what_two_budgets_leave() -> None:
    separate = Budget("each of 4 GPUs", (), 100, 100, 90, 50, 40, False)
    assert separate.left_bytes(30, 40) == 60  # the host's processes fit, or they do not
    assert separate.left_bytes(30, 45) == -5 and separate.lacking(80, 45, 4) == HOST_MEMORY
    shared = replace(separate, shared=True, host_budget_bytes=85)
    assert shared.left_bytes(30, 10) == 45 and shared.left_bytes(30, 0) == 55
    assert shared.lacking(80, 10, 1) == HOST_MEMORY and separate.lacking(95, 0, 4) == "each of 4 GPUs"
    assert replace(shared, host_budget_bytes=None).left_bytes(30, 99) == 60
