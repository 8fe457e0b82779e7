"""Temperatures, power, fan and clocks of one GPU.

Sources: the kernel's Documentation/gpu/amdgpu/thermal (hwmon, pp_dpm_*) and Documentation/hwmon/sysfs-interface:
temperatures in thousandths of a degree, power in microwatts, frequencies in Hz, pwm1 from 0 to 255.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from step128_launcher.telemetry.cards import Card
from step128_launcher.telemetry.families import Sample
from step128_launcher.telemetry.readings import Readings

# What a sensor may say; beyond it, it is a driver's "unknown" or a wrong unit.
_COLDEST, _HOTTEST = -40_000, 200_000
_MAX_MICROWATTS = 5_000_000_000
_MAX_RPM = 30_000
MAX_MEGAHERTZ = 10_000
_MAX_HERTZ = MAX_MEGAHERTZ * 1_000_000

_POWER_CAPS = {"power1_cap": "power_cap", "power1_cap_default": "power_cap_default", "power1_cap_max": "power_cap_max"}
_FREQUENCIES = {"freq1_input": "sclk", "freq2_input": "mclk"}
_CLOCKS = ("sclk", "mclk", "fclk", "socclk")
# "1: 1258Mhz *"; the star marks the level that is active, and S the deep sleep.
_LEVEL = re.compile(r"(?:\d+|S): *(\d{1,6}) *[Mm][Hh]z *(\*?)")


def read_temperatures(readings: Readings, card: Card) -> Iterator[Sample]:
    """Yield each sensor, and the temperature the driver calls critical for it."""
    if card.hwmon is None:
        return
    for file, sensor in card.sensors:
        for suffix, name in (("input", "temperature"), ("crit", "temperature_critical")):
            value = readings.number(f"{card.hwmon}/{file}_{suffix}", _COLDEST, _HOTTEST, per=1000)
            if value is not None:
                yield Sample(f"step128_gpu_{name}_celsius", (*card.labels, sensor), value)


def read_power(readings: Readings, card: Card) -> Iterator[Sample]:
    """Yield the package's power, averaged where the card tells it so, and its caps; an APU has none."""
    if card.hwmon is None:
        return
    for file in ("power1_average", "power1_input"):
        watts = readings.number(f"{card.hwmon}/{file}", 0, _MAX_MICROWATTS, per=1e6)
        if watts is not None:
            yield Sample("step128_gpu_power_watts", card.labels, watts)
            break
    for file, name in _POWER_CAPS.items():
        watts = readings.number(f"{card.hwmon}/{file}", 1, _MAX_MICROWATTS, per=1e6)
        if watts is not None:
            yield Sample(f"step128_gpu_{name}_watts", card.labels, watts)


def read_fan(readings: Readings, card: Card) -> Iterator[Sample]:
    """Yield the fan's turns and its duty cycle."""
    if card.hwmon is None:
        return
    for file, name in (("fan1_input", "fan_rpm"), ("fan1_max", "fan_max_rpm")):
        turns = readings.number(f"{card.hwmon}/{file}", 0, _MAX_RPM)
        if turns is not None:
            yield Sample(f"step128_gpu_{name}", card.labels, turns)
    duty = readings.number(f"{card.hwmon}/pwm1", 0, 255, per=255)
    if duty is not None:
        yield Sample("step128_gpu_fan_ratio", card.labels, duty)


def read_clocks(readings: Readings, card: Card) -> Iterator[Sample]:
    """Yield the clocks now, from hwmon or else the level that is active, and each clock's highest level."""
    now: dict[str, float] = {}
    if card.hwmon is not None:
        for file, clock in _FREQUENCIES.items():
            hertz = readings.number(f"{card.hwmon}/{file}", 0, _MAX_HERTZ)
            if hertz is not None:
                now[clock] = hertz
    for clock in _CLOCKS:
        levels = _read_levels(readings, f"{card.device}/pp_dpm_{clock}")
        if levels:
            highest = max(megahertz for megahertz, _ in levels) * 1e6
            yield Sample("step128_gpu_clock_max_hertz", (*card.labels, clock), highest)
        for megahertz, active in levels:
            if active:
                now.setdefault(clock, megahertz * 1e6)
    for clock, hertz in now.items():
        yield Sample("step128_gpu_clock_hertz", (*card.labels, clock), hertz)


def _read_levels(readings: Readings, path: str) -> list[tuple[int, bool]]:
    """Return (MHz, whether it is active) of each level; a GPU that sleeps may list none."""
    levels = []
    for line in (readings.text(path) or "").splitlines():
        match = _LEVEL.fullmatch(line.strip())
        if match is None or int(match[1]) > MAX_MEGAHERTZ:
            readings.note(Path(path), f"{line[:40]!r} is no level of a clock")
            return []
        levels.append((int(match[1]), match[2] == "*"))
    return levels
