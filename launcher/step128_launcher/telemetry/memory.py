"""Memory and load of one GPU.

Source: the kernel's Documentation/gpu/amdgpu, driver-misc and thermal (mem_info_* in bytes, *_busy_percent).
"""

import re
from collections.abc import Iterator
from pathlib import Path

from step128_launcher.machine.reader import MAX_MEMORY_BYTES
from step128_launcher.telemetry.cards import Card
from step128_launcher.telemetry.families import Sample
from step128_launcher.telemetry.readings import Readings

_POOLS = {"vram": "vram", "vis_vram": "visible_vram", "gtt": "gtt"}
_LEVEL = re.compile(r"[a-z_]{1,40}")


def read_memory(readings: Readings, card: Card) -> Iterator[Sample]:
    """Yield total and used bytes of each pool; a use above the total is dropped."""
    for pool, name in _POOLS.items():
        total = readings.number(f"{card.device}/mem_info_{pool}_total", 0, MAX_MEMORY_BYTES)
        used = readings.number(f"{card.device}/mem_info_{pool}_used", 0, MAX_MEMORY_BYTES)
        if total is not None:
            yield Sample(f"step128_gpu_{name}_total_bytes", card.labels, total)
        if used is not None and total is not None and used > total:
            readings.drop(
                "absurd", f"{card.device}/mem_info_{pool}_used holds {used:.0f}, more than the total {total:.0f}"
            )
        elif used is not None:
            yield Sample(f"step128_gpu_{name}_used_bytes", card.labels, used)


def read_load(readings: Readings, card: Card) -> Iterator[Sample]:
    """Yield how busy the GPU and its memory controller are, and the performance level that is set."""
    for file, name in (("gpu_busy_percent", "busy"), ("mem_busy_percent", "memory_busy")):
        share = readings.number(f"{card.device}/{file}", 0, 100, per=100)
        if share is not None:
            yield Sample(f"step128_gpu_{name}_ratio", card.labels, share)
    path = f"{card.device}/power_dpm_force_performance_level"
    level = readings.text(path)
    if level is not None and _LEVEL.fullmatch(level):
        yield Sample("step128_gpu_performance_level", (*card.labels, level), 1.0)
    elif level is not None:
        readings.note(Path(path), f"{level[:40]!r} is no performance level")
