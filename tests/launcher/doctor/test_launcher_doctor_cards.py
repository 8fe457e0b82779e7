"""The doctor's checks of cards: collectives among them, power, clocks, heat."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.doctor import Finding, power, rccl
from step128_launcher.doctor.context import Context
from step128_launcher.machine.types import PcieLink
from step128_launcher.planning.profiles import load_profile

QUAD = "quad-r9700"
STRIX = "strix-halo-128-gtt120"
SINGLE = "single-r9700"
SPARK = "dgx-spark"
GIB = 2**30
SAFE = {"NCCL_PROTO": "Simple", "NCCL_P2P_DISABLE": "1"}


def gpu(number: int | None, **fields: Any) -> tuple[int | None, dict[str, Any]]:
    return number, fields


CASES: list[tuple[Callable[[Context], Finding], str, Any, dict[str, str], str, str]] = [
    (rccl.check_protocol, QUAD, None, SAFE, "PASS", "the environment"),
    (rccl.check_protocol, QUAD, None, {}, "FAIL", "1.0.70201"),
    (rccl.check_protocol, QUAD, None, {"NCCL_PROTO": "LL,Simple"}, "FAIL", "export NCCL_PROTO=Simple"),
    (rccl.check_protocol, SINGLE, None, {}, "SKIP", "one card, one rank"),
    (rccl.check_protocol, "quad-48gb", None, {}, "SKIP", "no gfx12"),
    (rccl.check_peer_to_peer, QUAD, None, SAFE, "PASS", "host memory"),
    (rccl.check_peer_to_peer, QUAD, None, {}, "FAIL", "reset the host"),
    (rccl.check_peer_to_peer, QUAD, None, {"NCCL_P2P_DISABLE": "0"}, "WARN", "lspci"),
    (rccl.check_peer_to_peer, STRIX, None, {}, "SKIP", "shares the host's memory"),
    (rccl.check_resizable_bar, QUAD, None, {}, "PASS", "cards: 4"),
    (
        rccl.check_resizable_bar,
        QUAD,
        gpu(1, visible_vram_bytes=256 << 20),
        {},
        "WARN",
        "256 MiB of the memory of 0000:23",
    ),
    (rccl.check_resizable_bar, QUAD, gpu(1, visible_vram_bytes=None), {}, "SKIP", "does not tell"),
    (rccl.check_links, QUAD, None, {}, "PASS", "x16 of x16"),
    (rccl.check_links, QUAD, gpu(2, link=PcieLink(16.0, 4, 16.0, 16)), {}, "WARN", "Reseat"),
    (rccl.check_links, QUAD, gpu(2, link=PcieLink(16.0, 8, 16.0, 8)), {}, "WARN", "uneven"),
    (rccl.check_links, QUAD, gpu(None, link=PcieLink(16.0, 4, 16.0, 4)), {}, "WARN", "narrow"),
    (rccl.check_links, SINGLE, None, {}, "PASS", "x8 of x8"),
    (rccl.check_links, QUAD, gpu(2, link=None), {}, "SKIP", "cannot be read"),
    (rccl.check_numa, QUAD, None, {}, "PASS", "node 0"),
    (rccl.check_numa, QUAD, gpu(3, numa_node=1), {}, "WARN", "0000:63:00.0 on node 1"),
    (rccl.check_numa, QUAD, gpu(3, numa_node=None), {}, "SKIP", "does not tell"),
    (rccl.check_iommu, QUAD, None, {}, "PASS", "identity"),
    (rccl.check_iommu, QUAD, gpu(1, iommu_domain="DMA-FQ"), {}, "WARN", "iommu=pt"),
    (rccl.check_iommu, QUAD, gpu(None, iommu_domain=None), {}, "PASS", "command line"),
    (rccl.check_iommu, STRIX, None, {}, "PASS", "amd_iommu=off"),
    (rccl.check_iommu, SINGLE, None, {}, "SKIP", "one card, one rank"),
    (power.check_power_caps, QUAD, None, {}, "PASS", "together 1200 W"),
    (power.check_power_caps, QUAD, gpu(2, power_cap_watts=210.0), {}, "WARN", "0000:43:00.0 210 W"),
    (power.check_power_caps, QUAD, gpu(2, power_cap_watts=None), {}, "SKIP", "cannot be read"),
    (power.check_equal_memory, QUAD, None, {}, "PASS", "4 cards of 31.86 GiB"),
    (power.check_equal_memory, QUAD, gpu(0, vram_total_bytes=30 * GIB), {}, "WARN", "ECC"),
    (power.check_equal_memory, QUAD, gpu(0, vram_used_bytes=2 * GIB), {}, "WARN", "in use before"),
    (power.check_equal_memory, QUAD, gpu(0, vram_total_bytes=None), {}, "SKIP", "cannot be read"),
    (power.check_temperatures, STRIX, None, {}, "PASS", "41 °C"),
    (power.check_temperatures, SPARK, None, {}, "SKIP", "no usable AMD GPU"),
    (power.check_temperatures, QUAD, None, {}, "PASS", "edge: 0000:03:00.0 41 °C"),
    (power.check_clocks, SPARK, None, {}, "SKIP", "no usable AMD GPU"),
    (power.check_clocks, SINGLE, None, {}, "SKIP", "does not tell"),
    (power.check_clocks, QUAD, None, {}, "PASS", "chosen by the driver"),
    (power.check_equal_memory, SPARK, (None, {"integrated": False}), {}, "SKIP", "fewer than two"),
    (rccl.check_protocol, SPARK, (None, {"integrated": False}), {}, "SKIP", "NVIDIA's"),
    (rccl.check_protocol, SPARK, None, {}, "SKIP", "NVIDIA GB10 shares"),
    (rccl.check_links, SPARK, (0, {"integrated": False, "link": PcieLink(32.0, 8, 32.0, 16)}), {}, "WARN", "Reseat"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__[6:]}-{case[1]}-{case[4]}")
def test_findings(case: Any, expect: Callable[[Any], None]) -> None:
    expect(case)


def test_profiles_settings_count_unless_the_user_sets_them(look: Callable[..., Finding], configs_dir: Path) -> None:
    profile = load_profile(configs_dir, "quad-r9700")
    profile = replace(profile, environment=tuple(SAFE.items()))
    for check in (rccl.check_protocol, rccl.check_peer_to_peer):
        found = look(check, QUAD, profile=profile)
        assert found.outcome == "PASS" and "profile quad-r9700" in found.evidence
        assert look(check, QUAD, None, {"NCCL_PROTO": "LL", "NCCL_P2P_DISABLE": "0"}, profile).outcome != "PASS"


@pytest.mark.parametrize(("millidegrees", "outcome"), [("62000", "WARN"), ("99000", "FAIL"), ("?", "PASS")])
def test_a_card_hotter_than_the_others(
    look: Callable[..., Finding], tree: Callable[[str], Path], millidegrees: str, outcome: str
) -> None:
    root = tree(QUAD)
    (sensor,) = (root / "sys/class/drm/card3/device/hwmon").glob("hwmon*/temp1_input")
    sensor.write_text(millidegrees)
    found = look(power.check_temperatures, root)
    assert found.outcome == outcome and "0000:63:00.0" in found.evidence


def test_an_integrated_gpus_heat(look: Callable[..., Finding], tree: Callable[[str], Path]) -> None:
    root = tree(STRIX)
    (sensor,) = (root / "sys/class/drm/card1/device/hwmon").glob("hwmon*/temp1_input")
    sensor.write_text("98000")
    assert look(power.check_temperatures, root).outcome == "FAIL"


@pytest.mark.parametrize(
    ("level", "busy", "step", "outcome", "word"),
    [
        ("auto", 3, 0, "PASS", "by the driver"),
        ("auto", 97, 2, "PASS", "by the driver"),
        ("auto", 97, 0, "WARN", "0: 500Mhz"),
        ("low", 3, 0, "WARN", "mostly low: 0000:c5:00.0 low"),
        ("manual", 97, 2, "WARN", "setperflevel auto"),
        ("high", 3, 2, "WARN", "at the top"),
    ],
)
def test_clocks(
    look: Callable[..., Finding],
    tree: Callable[[str], Path],
    level: str,
    busy: int,
    step: int,
    outcome: str,
    word: str,
) -> None:
    root = tree(STRIX)
    device = root / "sys/class/drm/card1/device"
    (device / "power_dpm_force_performance_level").write_text(f"{level}\n")
    (device / "gpu_busy_percent").write_text(f"{busy}\n")
    clocks = [f"{at}: {mhz}Mhz {'*' if at == step else ''}\n" for at, mhz in enumerate((500, 1100, 2900))]
    (device / "pp_dpm_sclk").write_text("".join(clocks))
    found = look(power.check_clocks, root)
    assert found.outcome == outcome and word in found.evidence + found.remedy, found
