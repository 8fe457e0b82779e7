"""The firmware's table `gpu_metrics`: throttling, an APU's memory bandwidth and power by part, averaged clocks.

Source: the kernel's drivers/gpu/drm/amd/include/kgd_pp_interface.h, which gives layout and units. The header names the
version; of it, smu_v14_0_2_ppt.c (R9700) writes 1.3 and smu_v14_0_0_ppt.c (Strix Halo) 3.0. Kernels before 6.9 wrote a
shorter 3.0, so the size counts too. A field of all ones is one that the firmware does not have.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from step128_launcher.telemetry.cards import Card
from step128_launcher.telemetry.families import Sample
from step128_launcher.telemetry.readings import Readings
from step128_launcher.telemetry.sensors import MAX_MEGAHERTZ
from step128_launcher.telemetry.throttling import RESIDENCIES, THROTTLERS

_HEADER = struct.Struct("<HBB")  # size, format revision, content revision
_ALL_ONES = {"H": 0xFFFF, "I": 0xFFFFFFFF, "Q": 0xFFFFFFFFFFFFFFFF}
_MAX_CELSIUS, _MAX_WATTS = 200, 5000
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class _Layout:
    """Where the fields lie, as name -> (offset, format); temperatures are in units of 1/`per_degree` degree."""

    temperatures: dict[str, tuple[int, str]]
    per_degree: int
    clocks: dict[str, tuple[int, str]]
    milliwatts: dict[str, tuple[int, str]]
    megabytes_per_second: dict[str, tuple[int, str]]
    throttle_status: int | None  # offset of the 64 bits
    residencies: int | None  # offset of the first of seven 32-bit counters


_CARD_1_3 = _Layout(
    temperatures={"vr_gfx": (10, "H"), "vr_soc": (12, "H"), "vr_mem": (14, "H")},
    per_degree=1,
    clocks={"sclk": (40, "H"), "socclk": (42, "H"), "mclk": (44, "H")},
    milliwatts={},
    megabytes_per_second={},
    throttle_status=112,
    residencies=None,
)
_APU_3_0 = _Layout(
    temperatures={"soc": (6, "H"), "skin": (40, "H")},
    per_degree=100,
    clocks={"sclk": (174, "H"), "socclk": (176, "H"), "fclk": (182, "H"), "mclk": (186, "H")},
    milliwatts={"socket": (112, "I"), "apu": (120, "I"), "gfx": (124, "I"), "cores": (132, "I")},
    megabytes_per_second={"read": (94, "H"), "write": (96, "H")},
    throttle_status=None,
    residencies=228,
)
_LAYOUTS = {(1, 3, 120): _CARD_1_3, (3, 0, 264): _APU_3_0}


def read_table(readings: Readings, card: Card) -> Iterator[Sample]:
    """Yield what the table holds beyond the other files; a version that is not known is skipped and counted."""
    path = Path(card.device, "gpu_metrics")
    data = readings.data(path)
    if data is None:
        return
    size, form, content = _HEADER.unpack_from(data) if len(data) >= _HEADER.size else (0, 0, 0)
    if size != len(data) or not size:
        readings.note(path, f"{len(data)} bytes, but its header says {size}")
        return
    layout = _LAYOUTS.get((form, content, size))
    labels = (*card.labels, f"{form}.{content}", str(size), "false" if layout is None else "true")
    yield Sample("step128_gpu_metrics_table_info", labels, 1.0)
    if layout is None:
        readings.unknown_tables[card.labels] += 1
    else:
        yield from _figures(readings, card, _Table(readings, path, data), layout)


class _Table:
    def __init__(self, readings: Readings, path: Path, data: bytes) -> None:
        self._readings, self._path, self._data = readings, path, data

    def value(self, offset: int, code: str, maximum: int | None = None) -> int | None:
        """Return a field that the firmware has and that is not above `maximum`."""
        value: int = struct.unpack_from(f"<{code}", self._data, offset)[0]
        if value == _ALL_ONES[code]:
            return None
        if maximum is not None and value > maximum:
            self._readings.note(self._path, f"{value} at {offset} is above {maximum}")
            return None
        return value


def _figures(readings: Readings, card: Card, table: _Table, layout: _Layout) -> Iterator[Sample]:
    for sensor, (offset, code) in layout.temperatures.items():
        degrees = table.value(offset, code, _MAX_CELSIUS * layout.per_degree)
        if degrees:  # a regulator or a skin sensor that the board does not have says 0
            celsius = degrees / layout.per_degree
            yield Sample("step128_gpu_temperature_celsius", (*card.labels, sensor), celsius)
    for clock, (offset, code) in layout.clocks.items():
        megahertz = table.value(offset, code, MAX_MEGAHERTZ)
        if megahertz is not None:
            yield Sample("step128_gpu_average_clock_hertz", (*card.labels, clock), megahertz * 1e6)
    for part, (offset, code) in layout.milliwatts.items():
        milliwatts = table.value(offset, code, _MAX_WATTS * 1000)
        if milliwatts is not None:
            yield Sample("step128_gpu_part_power_watts", (*card.labels, part), milliwatts / 1000)
    for direction, (offset, code) in layout.megabytes_per_second.items():
        rate = table.value(offset, code)
        if rate is not None:
            yield Sample(f"step128_gpu_dram_{direction}_bytes_per_second", card.labels, float(rate * _MEGABYTE))
    if layout.throttle_status is not None:
        bits = table.value(layout.throttle_status, "Q")
        for throttler in THROTTLERS if bits is not None else ():
            labels = (*card.labels, throttler.reason, throttler.cause)
            yield Sample("step128_gpu_throttled", labels, float((bits or 0) >> throttler.bit & 1))
    if layout.residencies is not None:
        for throttler in RESIDENCIES:
            count = table.value(layout.residencies + 4 * throttler.bit, "I")
            if count is not None:
                labels = (*card.labels, throttler.reason, throttler.cause)
                yield Sample("step128_gpu_throttle_residency", labels, float(count))
