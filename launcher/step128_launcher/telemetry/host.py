"""Memory of the host, which on unified boxes is the GPU's too. Source: proc_meminfo(5), whose "kB" means KiB."""

from collections.abc import Iterator
from pathlib import Path

from step128_launcher.machine.cgroup import read_cgroup
from step128_launcher.machine.reader import MAX_MEMORY_BYTES, whole_number
from step128_launcher.telemetry.families import Sample
from step128_launcher.telemetry.readings import Readings

_FIGURES = {
    "MemTotal": "memory_total",
    "MemAvailable": "memory_available",
    "SwapTotal": "swap_total",
    "SwapFree": "swap_free",
}
_MAY_BE_ABSENT = ("SwapTotal", "SwapFree")  # from a container's view of the file


def read_host(readings: Readings) -> Iterator[Sample]:
    """Yield memory and swap, and what the container's limit leaves."""
    path = readings.root / "proc/meminfo"
    text = readings.text(path)
    lines = [] if text is None else [line.partition(":") for line in text.splitlines()]
    found = {key: rest for key, _, rest in lines}
    for key, name in _FIGURES.items():
        if text is None or (key not in found and key in _MAY_BE_ABSENT):
            continue
        kib = whole_number(found.get(key, "").removesuffix("kB").strip())
        if kib is None or not 0 <= kib * 1024 <= MAX_MEMORY_BYTES:
            readings.note(Path(path), f"no usable {key}")
        else:
            yield Sample(f"step128_host_{name}_bytes", (), float(kib * 1024))
    headroom = read_cgroup(readings.root).memory_headroom_bytes
    if headroom is not None:
        yield Sample("step128_host_cgroup_headroom_bytes", (), float(headroom))
