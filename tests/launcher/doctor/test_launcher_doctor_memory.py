"""The doctor's checks of memory that host and GPU share."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.doctor import Finding, fit, memory
from step128_launcher.doctor.context import Context
from step128_launcher.machine.types import TtmLimit
from step128_launcher.planning.pools import gtt_goal_bytes
from step128_launcher.planning.profiles import Profile

QUAD = "quad-r9700"
STRIX = "strix-halo-128-gtt120"
BOTH = "r9700-plus-igpu"
DEFAULT = "strix-halo-128-default"
CARVED = "strix-halo-128-carveout96"
LXC = "strix-halo-lxc"
NONE = "no-gpu"
SPARK = "dgx-spark"
GIB = 2**30

machine = dict  # changes of the machine


def gpu(number: int | None, **fields: Any) -> tuple[int | None, dict[str, Any]]:
    return number, fields


CASES: list[tuple[Callable[[Context], Finding], str, Any, dict[str, str], str, str]] = [
    (memory.check_carve_out, STRIX, None, {}, "PASS", "512.0 MiB"),
    (memory.check_carve_out, CARVED, None, {}, "WARN", "amd-ttm --set 120"),
    (memory.check_carve_out, BOTH, None, {}, "SKIP", "memory of its own"),
    (memory.check_gtt, STRIX, None, {}, "PASS", "120.00 GiB"),
    (memory.check_gtt, DEFAULT, None, {}, "WARN", "options ttm pages_limit=31457280"),
    (memory.check_gtt, CARVED, None, {}, "SKIP", "not used"),
    (memory.check_gtt, STRIX, gpu(0, gtt_total_bytes=200 * GIB), {}, "WARN", "more than there is"),
    (memory.check_ttm, STRIX, None, {}, "PASS", "ttm 120.00 GiB"),
    (memory.check_ttm, STRIX, machine(ttm_limits=(TtmLimit("ttm", 60 * GIB),)), {}, "WARN", "fail at the limit"),
    (
        memory.check_ttm,
        STRIX,
        machine(ttm_limits=(TtmLimit("ttm", 62 * GIB), TtmLimit("amdttm", 120 * GIB))),
        {},
        "WARN",
        "options amdttm pages_limit=",
    ),
    (
        memory.check_ttm,
        STRIX,
        machine(kernel_command_line="quiet amdgpu.gttsize=131072 ttm.pages_limit=31457280"),
        {},
        "WARN",
        "Remove amdgpu.gttsize",
    ),
    (memory.check_ttm, STRIX, machine(ttm_limits=()), {}, "SKIP", "no TTM module"),
    (memory.check_container_limit, STRIX, None, {}, "PASS", "no memory limit"),
    (memory.check_container_limit, LXC, None, {}, "WARN", "64.00 GiB"),
    (memory.check_container_limit, "container-6gib", None, {}, "PASS", "keeps to it"),
    (memory.check_swap, STRIX, None, {}, "PASS", "0 B"),
    (memory.check_swap, STRIX, machine(swap_free_bytes=3 * GIB), {}, "WARN", "swapoff"),
    (memory.check_swap, QUAD, None, {}, "SKIP", "memory of its own"),
    (memory.check_carve_out, SPARK, None, {}, "SKIP", "only AMD APUs have one; NVIDIA GB10"),
    (memory.check_gtt, "jetson-thor", None, {}, "SKIP", "only AMD APUs have one"),
    (memory.check_ttm, NONE, None, {}, "SKIP", "no usable GPU"),
    (memory.check_swap, SPARK, {"swap_free_bytes": 3 * GIB}, {}, "WARN", "swapoff"),
    (fit.check_host_memory, QUAD, None, {}, "SKIP", "memory of its own"),
    (fit.check_host_memory, CARVED, None, {}, "SKIP", "carve-out"),
    (fit.check_host_memory, STRIX, None, {}, "PASS", "121.00 GiB of 125.00 GiB"),
    (fit.check_host_memory, SPARK, {"memory_available_bytes": 60 * GIB}, {}, "WARN", "Close other programs"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__[6:]}-{case[1]}-{case[4]}")
def test_findings(case: Any, expect: Callable[[Any], None]) -> None:
    expect(case)


def test_the_remedy_is_the_planners_goal(look: Callable[..., Finding], context: Callable[..., Context]) -> None:
    hardware = context(DEFAULT).hardware
    goal = gtt_goal_bytes(hardware, hardware.gpus[0])
    found = look(memory.check_gtt, DEFAULT)
    assert f"amd-ttm --set {goal // GIB}`" in found.remedy and f"pages_limit={goal // 4096}'" in found.remedy
    assert look(memory.check_gtt, DEFAULT, (0, {"gtt_total_bytes": goal})).outcome == "PASS"
    assert look(memory.check_gtt, DEFAULT, (0, {"gtt_total_bytes": goal * 9 // 10})).outcome == "WARN"


@pytest.mark.parametrize(("free_gib", "outcome"), [(100, "PASS"), (40, "WARN")])
def test_page_cache_in_the_way(
    look: Callable[..., Finding], tree: Callable[[str], Path], free_gib: int, outcome: str
) -> None:
    root = tree(SPARK)
    meminfo = root / "proc/meminfo"
    meminfo.write_text(f"MemFree: {free_gib << 20} kB\n{meminfo.read_text()}")
    found = look(fit.check_host_memory, root)
    assert found.outcome == outcome and (outcome == "PASS" or "drop_caches" in found.remedy), found
    assert "page cache cannot be read" not in found.evidence


@pytest.mark.parametrize(
    ("tree", "share", "host_share", "outcome", "word"),
    [
        (QUAD, 0.92, 0.97, "PASS", "92%"),  # on cards the host's share is not the model's
        (QUAD, 0.97, 0.9, "WARN", "memory.usable_fraction to 0.95"),
        (STRIX, 0.95, 0.95, "PASS", "95%"),
        (STRIX, 0.95, 0.97, "WARN", "Set memory.host_usable_fraction to 0.95"),
        (SPARK, 0.95, 0.97, "WARN", "the kernel kills a process"),
    ],
)
def test_share_of_the_memory(
    look: Callable[..., Finding],
    profile_of: Callable[[str], Profile],
    tree: str,
    share: float,
    host_share: float,
    outcome: str,
    word: str,
) -> None:
    profile = replace(profile_of("quad-r9700"), usable_fraction=share, host_usable_fraction=host_share)
    found = look(fit.check_utilization, tree, profile=profile)
    assert found.outcome == outcome and word in found.evidence + found.remedy, found
