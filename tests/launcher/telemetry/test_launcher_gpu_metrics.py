"""The firmware's binary table: each throttle bit, each version, and bytes that are none."""

import runpy
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MACHINES = Path(__file__).parents[2] / "machines"
MADE = runpy.run_path(str(MACHINES / "make_trees.py"))
Scraper = Any  # the class of the fixture `scraper`; a test cannot import conftest.py
# The kernel's amdgpu_smu.h, by bit.
BITS = {
    **{0: ("ppt0", "power"), 1: ("ppt1", "power"), 2: ("ppt2", "power"), 3: ("ppt3", "power")},
    **{16: ("tdc_gfx", "current"), 17: ("tdc_soc", "current"), 18: ("tdc_mem", "current"), 22: ("edc_gfx", "current")},
    **{34: ("temp_mem", "temperature"), 35: ("temp_edge", "temperature"), 36: ("temp_hotspot", "temperature")},
    **{38: ("temp_vr_gfx", "temperature"), 39: ("temp_vr_soc", "temperature")},
    **{40: ("temp_vr_mem0", "temperature"), 41: ("temp_vr_mem1", "temperature"), 44: ("vrhot0", "temperature")},
    **{46: ("prochot_cpu", "prochot"), 47: ("prochot_gfx", "prochot"), 23: ("apcc", "other"), 57: ("fit", "other")},
}


@pytest.fixture
def box(tree: Callable[[str], Path], scraper: type[Scraper]) -> tuple[Scraper, Path]:
    root = tree("strix-halo-128-gtt120")
    (path,) = root.glob("sys/devices/**/gpu_metrics")
    return scraper(root), path


@pytest.mark.parametrize("bit", BITS)
def test_each_bit_is_its_reason(bit: int, box: tuple[Scraper, Path]) -> None:
    one, path = box
    path.write_bytes(MADE["card_metrics"](1 << bit))
    series = one.scrape()["step128_gpu_throttled"].items()
    assert [(labels[3], labels[1]) for labels, value in series if value] == [BITS[bit]]


def test_the_residencies_are_in_the_kernels_order(box: tuple[Scraper, Path]) -> None:
    one, path = box
    path.write_bytes(MADE["apu_metrics"]((1, 2, 3, 4, 5, 6, 2**32 - 1)))
    series = one.scrape()["step128_gpu_throttle_residency_total"].items()
    assert {labels[3]: value for labels, value in series} == {  # all ones: not there
        **{"prochot": 1, "spl": 2, "fppt": 3, "sppt": 4},
        **{"thm_core": 5, "thm_gfx": 6},
    }


@pytest.mark.parametrize(
    ("size", "form", "content"), [(264, 1, 8), (104, 1, 2), (256, 3, 0), (400, 3, 1), (120, 9, 9), (4, 0, 0)]
)
def test_a_version_that_is_not_known_is_skipped_and_counted(
    size: int, form: int, content: int, box: tuple[Scraper, Path]
) -> None:
    """(3, 0) with fewer bytes is what kernels before 6.9 wrote."""
    one, path = box
    path.write_bytes(struct.pack("<HBB", size, form, content) + b"\x07" * (size - 4))
    one.scrape()
    found = one.scrape()
    card = ("card1", "0000:c5:00.0")
    assert found["step128_gpu_metrics_unknown_total"] == {card: 2}
    assert list(found["step128_gpu_metrics_table_info"]) == [(str(size), *card, "false", f"{form}.{content}")]
    assert not {"step128_gpu_throttled", "step128_gpu_part_power_watts", "step128_gpu_average_clock_hertz"} & set(found)
    assert one.errors() == set() and "step128_gpu_power_watts" in found


@pytest.mark.parametrize(
    "data", [b"", b"\x78", b"\xff" * 120, MADE["card_metrics"]()[:-1], MADE["apu_metrics"]() + b"x"]
)
def test_bytes_that_are_no_table_are_absurd(data: bytes, box: tuple[Scraper, Path]) -> None:
    one, path = box
    path.write_bytes(data)
    assert one.errors() == {("0000:c5:00.0", "gpu_metrics")}


def test_a_table_of_all_ones_has_no_figures(box: tuple[Scraper, Path]) -> None:
    one, path = box
    for made in (MADE["card_metrics"](), MADE["apu_metrics"]()):
        path.write_bytes(made[:4] + b"\xff" * (len(made) - 4))
        found = one.scrape()
        assert one.errors() == set() and "step128_gpu_average_clock_hertz" not in found
        assert not {"step128_gpu_throttled", "step128_gpu_throttle_residency_total"} & set(found)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(min_size=260, max_size=260), card=st.booleans(), text=st.binary(max_size=60))
def test_no_bytes_stop_a_scrape(body: bytes, card: bool, text: bytes, box: tuple[Scraper, Path]) -> None:
    one, path = box
    path.write_bytes(struct.pack("<HBB", 120, 1, 3) + body[:116] if card else struct.pack("<HBB", 264, 3, 0) + body)
    path.with_name("pp_dpm_mclk").write_bytes(text)
    path.with_name("power_dpm_force_performance_level").write_bytes(text)
    found = one.scrape()
    assert all(-40 <= value <= 200 for value in found["step128_gpu_temperature_celsius"].values())
    assert all(value <= 10e9 for value in found.get("step128_gpu_average_clock_hertz", {}).values())
    assert all(value <= 5000 for value in found.get("step128_gpu_part_power_watts", {}).values())
