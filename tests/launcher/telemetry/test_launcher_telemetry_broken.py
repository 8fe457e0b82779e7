"""Files that are missing, denied, absurd or stuck: only their own figures go, and the source says so."""

import errno
import io
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Scraper = Any  # the class of the fixture `scraper`; a test cannot import conftest.py
GPU = "0000:03:00.0"
DEVICE = "sys/devices/pci0000:00/0000:00:01.1/0000:01:00.0/0000:02:00.0/0000:03:00.0"
HWMON = f"{DEVICE}/hwmon/hwmon3"
# A file, what it feeds, and its source.
FIGURES = [
    (f"{DEVICE}/mem_info_vram_used", "step128_gpu_vram_used_bytes", "gpu_memory"),
    (f"{DEVICE}/mem_info_gtt_total", "step128_gpu_gtt_total_bytes", "gpu_memory"),
    (f"{DEVICE}/gpu_busy_percent", "step128_gpu_busy_ratio", "gpu_load"),
    (f"{DEVICE}/power_dpm_force_performance_level", "step128_gpu_performance_level", "gpu_load"),
    (f"{HWMON}/temp3_input", "step128_gpu_temperature_celsius", "gpu_temperature"),
    (f"{HWMON}/power1_average", "step128_gpu_power_watts", "gpu_power"),
    (f"{HWMON}/power1_cap", "step128_gpu_power_cap_watts", "gpu_power"),
    (f"{HWMON}/fan1_input", "step128_gpu_fan_rpm", "gpu_fan"),
    (f"{HWMON}/pwm1", "step128_gpu_fan_ratio", "gpu_fan"),
    (f"{HWMON}/freq1_input", "step128_gpu_clock_hertz", "gpu_clocks"),
    (f"{DEVICE}/pp_dpm_fclk", "step128_gpu_clock_max_hertz", "gpu_clocks"),
    (f"{DEVICE}/current_link_speed", "step128_gpu_pcie_speed_gts", "gpu_pcie"),
    (f"{DEVICE}/gpu_metrics", "step128_gpu_throttled", "gpu_metrics"),
]
ABSURD = ["", "garbage", "-99999999", "18446744073709551615", "1e3", "\x00\x00", "٣"]
# Proper for these: no level at all, and any word. The bytes of gpu_metrics are tested apart.
PROPER = {("pp_dpm_fclk", ""), ("power_dpm_force_performance_level", "garbage")}
SPOILT = [
    (path, source, text)
    for path, _, source in FIGURES
    for text in ABSURD
    if not path.endswith("gpu_metrics") and (Path(path).name, text) not in PROPER
]


def of_gpu(found: dict[str, dict[tuple[str, ...], float]]) -> dict[str, int]:
    """How many samples each metric has for the card."""
    return {name: sum(GPU in labels for labels in series) for name, series in found.items()}


def dropped(found: dict[str, dict[tuple[str, ...], float]]) -> dict[tuple[str, ...], float]:
    return found.get("step128_exporter_dropped_reads_total", {})


@pytest.mark.parametrize(("path", "metric", "source"), FIGURES, ids=lambda value: Path(str(value)).name)
def test_what_never_was_there_is_not_offered(
    path: str, metric: str, source: str, tree: Callable[[str], Path], scraper: type[Scraper]
) -> None:
    root = tree("quad-r9700")
    whole = of_gpu(scraper(root).scrape())
    (root / path).unlink()
    found = scraper(root).scrape()
    assert dropped(found) == {} and not any(found["step128_exporter_source_error"].values())
    less = {name for name, count in whole.items() if of_gpu(found).get(name, 0) < count}
    if path.endswith(("freq1_input", "current_link_speed")):  # another file tells the same
        assert not less
    else:
        assert metric in less and len(less) <= (4 if "gpu_metrics" in path else 2)


@pytest.mark.parametrize(("path", "source", "text"), SPOILT, ids=lambda value: Path(str(value)).name)
def test_an_absurd_figure_is_dropped_and_counted(
    path: str, source: str, text: str, tree: Callable[[str], Path], scraper: type[Scraper]
) -> None:
    root = tree("quad-r9700")
    (root / path).write_text(text)
    one = scraper(root)
    assert dropped(one.scrape()) == {(GPU, source, "absurd"): 1}
    assert one.errors() == {(GPU, source)}
    (said,) = one.said  # once, with the file's name
    assert said.startswith(f"telemetry: {source} of {GPU}: absurd: ") and Path(path).name in said


def test_power_in_a_wrong_unit_is_absurd(tree: Callable[[str], Path], scraper: type[Scraper]) -> None:
    root = tree("quad-r9700")
    (root / HWMON / "power1_average").write_text(str(24_000_000 * 1000))
    found = scraper(root).scrape()
    assert of_gpu(found).get("step128_gpu_power_watts", 0) == 0


def test_more_used_than_there_is_is_absurd(tree: Callable[[str], Path], scraper: type[Scraper]) -> None:
    root = tree("quad-r9700")
    (root / DEVICE / "mem_info_vram_used").write_text(str(2**40))
    one = scraper(root)
    assert one.errors() == {(GPU, "gpu_memory")} and of_gpu(one.scrape()).get("step128_gpu_vram_used_bytes", 0) == 0


def fail_open(monkeypatch: pytest.MonkeyPatch, end: str, code: int) -> dict[str, bool]:
    """Let open() of a path with this end fail while the switch is on; root may read anything, so modes do not help."""
    switch = {"on": True}

    def fake(path: str, *arguments: Any, **options: Any) -> Any:
        if switch["on"] and str(path).endswith(end):
            raise OSError(code, os.strerror(code), path)
        return io.open(path, *arguments, **options)  # noqa: UP020  the real one, whatever `open` is set to

    monkeypatch.setattr("step128_launcher.telemetry.readings.open", fake, raising=False)
    return switch


@pytest.mark.parametrize(
    ("code", "why"),
    [(errno.EPERM, "denied"), (errno.EACCES, "denied"), (errno.EIO, "failed"), (errno.ENODEV, "failed")],
)
def test_a_read_that_fails_is_counted_and_recovers(
    code: int, why: str, tree: Callable[[str], Path], scraper: type[Scraper], monkeypatch: pytest.MonkeyPatch
) -> None:
    """amdgpu answers EPERM while it resets a card."""
    one = scraper(tree("quad-r9700"))
    assert one.errors() == set()
    switch = fail_open(monkeypatch, f"{HWMON}/power1_average", code)
    assert one.errors() == {(GPU, "gpu_power")}
    found = one.scrape()
    assert dropped(found) == {(GPU, "gpu_power", why): 2} and GPU in str(found["step128_gpu_power_cap_watts"])
    switch["on"] = False
    found = one.scrape()
    assert one.errors() == set() and dropped(found) == {(GPU, "gpu_power", why): 2}
    assert of_gpu(found)["step128_gpu_power_watts"] == 1


def test_what_the_driver_says_it_does_not_have_is_no_error(
    tree: Callable[[str], Path], scraper: type[Scraper], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_open(monkeypatch, f"{HWMON}/power1_average", errno.EOPNOTSUPP)
    assert scraper(tree("quad-r9700")).errors() == set()


def test_a_figure_that_vanishes_is_an_error_until_it_is_back(
    tree: Callable[[str], Path], scraper: type[Scraper]
) -> None:
    root = tree("quad-r9700")
    one = scraper(root)
    assert one.errors() == set()
    path = root / DEVICE / "gpu_busy_percent"
    path.unlink()
    for _ in range(3):
        assert one.errors() == {(GPU, "gpu_load")}
    assert dropped(one.scrape()) == {(GPU, "gpu_load", "vanished"): 4}
    path.write_text("7")
    assert one.errors() == set()


def test_a_card_that_fell_off_the_bus_is_an_error_until_it_is_back(
    tree: Callable[[str], Path], scraper: type[Scraper]
) -> None:
    root = tree("quad-r9700")
    one = scraper(root)
    one.scrape()
    link, target = root / "sys/class/drm/card0", (root / "sys/class/drm/card0").readlink()
    link.unlink()
    assert one.errors() == {(GPU, "cards")}
    found = one.scrape()
    assert of_gpu(found).get("step128_gpu_vram_used_bytes", 0) == 0 and len(found["step128_gpu_vram_used_bytes"]) == 3
    link.symlink_to(target)
    assert one.errors() == set() and len(one.scrape()["step128_gpu_vram_used_bytes"]) == 4


def test_a_driver_that_is_loaded_again_is_found(tree: Callable[[str], Path], scraper: type[Scraper]) -> None:
    root = tree("quad-r9700")
    one = scraper(root)
    whole = of_gpu(one.scrape())
    (root / HWMON).rename(root / DEVICE / "hwmon/hwmon9")
    assert one.errors() > {(GPU, "gpu_power")}  # found out by this scrape
    assert one.errors() == set()
    again = of_gpu(one.scrape())
    assert {name: again[name] for name in whole} | {"step128_exporter_dropped_reads_total": 0} == whole | {
        "step128_exporter_dropped_reads_total": 0
    }


def test_a_read_that_hangs_costs_the_telemetry_and_no_more(tree: Callable[[str], Path], scraper: type[Scraper]) -> None:
    """A fifo without a writer blocks who opens it, as a GPU that hangs blocks who reads of it."""
    root = tree("strix-halo-128-gtt120")
    (path,) = root.glob("sys/devices/**/gpu_busy_percent")
    one = scraper(root)
    path.unlink()
    os.mkfifo(path)
    lost = threading.Thread(target=one.scrape, daemon=True)
    lost.start()
    time.sleep(0.2)
    start = time.monotonic()
    assert one.scrape() == {"step128_exporter_source_error": {("", "telemetry"): 1.0}}
    assert time.monotonic() - start < 1.0 and lost.is_alive()
    path.write_text("5")  # a writer: the read returns
    lost.join(timeout=5)
    assert not lost.is_alive()
    path.unlink()
    path.write_text("6")
    found = one.scrape()
    assert found["step128_gpu_busy_ratio"] == {("card1", "0000:c5:00.0"): 0.06}
    assert found["step128_exporter_source_error"][("", "telemetry")] == 0.0


def test_a_process_that_ended_is_no_error(tree: Callable[[str], Path], scraper: type[Scraper]) -> None:
    root = tree("strix-halo-128-gtt120")
    one = scraper(root)
    one.scrape()
    (root / "sys/class/kfd/kfd/proc/4321/vram_40001").unlink()
    (root / "sys/class/kfd/kfd/proc/77").mkdir()
    assert one.errors() == set()
    found = one.scrape()
    assert found["step128_kfd_processes"] == {(): 2}
    assert found["step128_kfd_process_vram_bytes"] == {("0000:c5:00.0",): 0}


@pytest.mark.parametrize("text", ["", "MemTotal: much\n", "MemTotal:  1 kB\nMemAvailable: -5 kB\n"])
def test_a_meminfo_that_says_nothing(text: str, tree: Callable[[str], Path], scraper: type[Scraper]) -> None:
    root = tree("strix-halo-128-gtt120")
    one = scraper(root)
    (root / "proc/meminfo").write_text(text)
    assert one.errors() == {("", "host")}
    assert "step128_host_memory_available_bytes" not in one.scrape()
