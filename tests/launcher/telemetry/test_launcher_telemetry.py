"""What the exporter tells of each machine, to the figure, and what a scrape costs."""

import runpy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.telemetry.families import FAMILIES

MACHINES = Path(__file__).parents[2] / "machines"
MIB, GIB = 2**20, 2**30
Scraper = Any  # the class of the fixture `scraper`; a test cannot import conftest.py
SCRAPE_LIMIT_SECONDS = 0.010
# Each of four R9700: name -> labels besides card and gpu, sorted by name -> value.
R9700 = {
    "vram_total_bytes": {(): 32624 * MIB},
    "vram_used_bytes": {(): 64 * MIB},
    "visible_vram_total_bytes": {(): 32624 * MIB},
    "visible_vram_used_bytes": {(): 64 * MIB},
    "gtt_total_bytes": {(): 131_735_552 * 512},
    "gtt_used_bytes": {(): 24 * MIB},
    "busy_ratio": {(): 0},
    "memory_busy_ratio": {(): 0},
    "power_watts": {(): 24},
    "power_cap_watts": {(): 300},
    "power_cap_default_watts": {(): 300},
    "power_cap_max_watts": {(): 300},
    "fan_rpm": {(): 1030},
    "fan_max_rpm": {(): 6000},
    "fan_ratio": {(): 0.2},
    "pcie_speed_gts": {(): 16},
    "pcie_max_speed_gts": {(): 16},
    "pcie_width_lanes": {(): 16},
    "pcie_max_width_lanes": {(): 16},
    "performance_level": {("auto",): 1},
    "temperature_celsius": {("edge",): 41, ("junction",): 44, ("mem",): 52}
    | {("vr_gfx",): 43, ("vr_soc",): 42, ("vr_mem",): 50},
    "temperature_critical_celsius": {("edge",): 100, ("junction",): 110, ("mem",): 108},
    "clock_hertz": {("sclk",): 30e6, ("mclk",): 96e6, ("fclk",): 300e6, ("socclk",): 500e6},
    "clock_max_hertz": {("sclk",): 2920e6, ("mclk",): 1258e6, ("fclk",): 2500e6, ("socclk",): 1200e6},
    "average_clock_hertz": {("sclk",): 30e6, ("mclk",): 96e6, ("socclk",): 500e6},
    "metrics_unknown_total": {(): 0},
}
STRIX_HALO = {
    "vram_total_bytes": {(): GIB // 2},
    "vram_used_bytes": {(): 64 * MIB},
    "visible_vram_total_bytes": {(): GIB // 2},
    "visible_vram_used_bytes": {(): 64 * MIB},
    "gtt_total_bytes": {(): 120 * GIB},
    "gtt_used_bytes": {(): 24 * MIB},
    "busy_ratio": {(): 0},
    "power_watts": {(): 11},
    "part_power_watts": {("socket",): 11.25, ("apu",): 10.5, ("gfx",): 1.5, ("cores",): 4},
    "performance_level": {("auto",): 1},
    "temperature_celsius": {("edge",): 41, ("soc",): 41, ("skin",): 36},
    # mclk and socclk are between two levels.
    "clock_hertz": {("sclk",): 600e6, ("fclk",): 1400e6},
    "clock_max_hertz": {("sclk",): 2900e6, ("mclk",): 1000e6, ("fclk",): 2000e6, ("socclk",): 1250e6},
    "average_clock_hertz": {("sclk",): 600e6, ("mclk",): 600e6, ("socclk",): 500e6, ("fclk",): 1400e6},
    "dram_read_bytes_per_second": {(): 812e6},
    "dram_write_bytes_per_second": {(): 340e6},
    "metrics_unknown_total": {(): 0},
}


def of_card(found: dict[str, dict[tuple[str, ...], float]], card: str, gpu: str) -> dict[str, dict[Any, float]]:
    """The card's own figures whose labels are card, gpu and at most one more, which is kept."""
    figures: dict[str, dict[Any, float]] = {}
    for name, series in found.items():
        for labels, value in series.items():
            if name.startswith("step128_gpu_") and card in labels and gpu in labels and len(labels) <= 3:
                rest = tuple(label for label in labels if label not in (card, gpu))
                figures.setdefault(name.removeprefix("step128_gpu_"), {})[rest] = value
    return figures


def test_quad_r9700(scraper: type[Scraper]) -> None:
    found = scraper(MACHINES / "quad-r9700").scrape()
    for number, bus in enumerate(("03", "23", "43", "63")):
        assert of_card(found, f"card{number}", f"0000:{bus}:00.0") == R9700
    throttled = found["step128_gpu_throttled"]
    assert len(throttled) == 4 * 25 and set(throttled.values()) == {0.0}
    assert {labels[1] for labels in throttled} == {"power", "current", "temperature", "prochot", "other"}
    assert found["step128_kfd_memory_bytes"] == {
        (f"0000:{bus}:00.0", "vram_public", str(node)): 32624 * MIB
        for node, bus in enumerate(("03", "23", "43", "63"), start=1)
    }
    assert set(found["step128_kfd_process_vram_bytes"].values()) == {32.0 * MIB}
    assert found["step128_kfd_processes"] == {(): 1} and found["step128_host_unified_memory"] == {(): 0}
    assert found["step128_host_memory_available_bytes"] == {(): 125_829_120 * 1024}
    assert found["step128_host_memory_total_bytes"] == {(): 131_735_552 * 1024}
    assert found["step128_host_swap_free_bytes"] == found["step128_host_swap_total_bytes"] == {(): 8388604 * 1024}
    info = next(labels for labels in found["step128_gpu_info"] if "card0" in labels)
    assert info == (
        *("card0", "0000:03:00.0", "false", "AMD Radeon AI PRO R9700", "1002:7551"),
        *("/dev/dri/renderD128", "gfx1201"),
    )


def test_strix_halo(scraper: type[Scraper]) -> None:
    found = scraper(MACHINES / "strix-halo-128-gtt120").scrape()
    assert of_card(found, "card1", "0000:c5:00.0") == STRIX_HALO
    residencies = {labels[3]: value for labels, value in found["step128_gpu_throttle_residency_total"].items()}
    assert residencies == {
        **{"prochot": 0, "spl": 0, "fppt": 1200, "sppt": 34},
        **{"thm_core": 0, "thm_gfx": 0, "thm_soc": 0},
    }
    assert found["step128_kfd_memory_bytes"] == {("0000:c5:00.0", "system", "1"): 120 * GIB}
    assert found["step128_host_unified_memory"] == {(): 1}


def test_a_limited_container_tells_what_is_left_of_its_limit(scraper: type[Scraper]) -> None:
    found = scraper(MACHINES / "strix-halo-lxc").scrape()
    assert found["step128_host_cgroup_headroom_bytes"] == {(): 62 * GIB}
    assert "step128_host_cgroup_headroom_bytes" not in scraper(MACHINES / "strix-halo-128-gtt120").scrape()


@pytest.mark.parametrize(("name", "unified"), [("no-gpu", {(): 1}), ("r9700-plus-igpu", {(): 0}), ("dgx-spark", None)])
def test_other_machines(name: str, unified: dict[Any, float] | None, scraper: type[Scraper]) -> None:
    found = scraper(MACHINES / name).scrape()
    assert found.get("step128_host_unified_memory") == unified
    assert ("step128_gpu_info" in found) is (name == "r9700-plus-igpu")


def test_nothing_fails_on_a_whole_machine_and_every_metric_is_on_one(scraper: type[Scraper]) -> None:
    names: set[str] = set()
    for tree in sorted(path for path in MACHINES.iterdir() if path.is_dir()):
        one = scraper(tree)
        assert one.errors() == set(), tree
        names |= {name.removesuffix("_total") if name not in FAMILIES else name for name in one.scrape()}
    assert names == set(FAMILIES) - {"step128_exporter_dropped_reads"}


def test_pcie_bw_is_never_opened(
    tree: Callable[[str], Path], scraper: type[Scraper], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree("quad-r9700")
    for device in root.glob("sys/devices/**/gpu_busy_percent"):
        device.with_name("pcie_bw").write_text("0 0 256")
    opened: list[str] = []
    real = open

    def watch(path: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", watch)
    monkeypatch.setattr("io.open", watch)  # pathlib's
    scraper(root).scrape()
    assert any(path.endswith("gpu_metrics") for path in opened)
    assert not [path for path in opened if path.endswith("pcie_bw")]


@pytest.mark.parametrize("name", ["quad-r9700", "strix-halo-128-gtt120"])
def test_a_scrape_takes_less_than_10_ms(name: str, scraper: type[Scraper], measured: Callable[[str], None]) -> None:
    """Of this process, text included: other processes of a busy machine may hold it up longer."""
    one = scraper(MACHINES / name)
    one.text()
    seconds = []
    for _ in range(30):
        start = time.thread_time()
        text = one.text()
        seconds.append(time.thread_time() - start)
    median = statistics.median(seconds)
    samples = sum(not line.startswith("#") for line in text.splitlines())
    measured(f"scrape of {name}: {median * 1e3:.1f} ms of CPU, median of 30, {samples} samples (files, not sysfs)")
    assert median < SCRAPE_LIMIT_SECONDS


def test_the_table_the_trees_hold_is_the_kernels_size() -> None:
    made = runpy.run_path(str(MACHINES / "make_trees.py"))
    assert (len(made["card_metrics"]()), len(made["apu_metrics"]())) == (120, 264)
