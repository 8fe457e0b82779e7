"""How much memory this process uses, how much it may have, and what a person writes for an amount of it."""

from __future__ import annotations

import os
import re
from argparse import ArgumentTypeError
from collections.abc import Iterator
from pathlib import Path

DEFAULT_MAX_MEMORY_BYTES = 8 << 30
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes (Linux: /proc/self/statm)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_host_bytes(root: Path = Path("/")) -> int:
    """What the kernel says can be had without swapping, or less where a container's limit (cgroup v1 or v2) is near.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([available, *(_left_bytes(*found) for found in _limited_cgroups(root))]))


def _limited_cgroups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Every cgroup with a memory limit that this process is in: its folder, and the names of what it states."""
    mount, path_of = root / "sys/fs/cgroup", {}
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        path_of[controllers] = path.strip("/")
    for controllers, base, limit, usage, prefix in (
        ("", mount, "memory.max", "memory.current", ""),
        ("memory", mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        inner = base / path_of.get(controllers, "")  # a container may see only its own, as the mount's root
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(base) and _stated(folder / limit) not in ("", "max"):
                yield folder, limit, usage, prefix


def _stated(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""


def _left_bytes(folder: Path, limit: str, usage: str, prefix: str) -> int:
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    # The cache of files that were read goes when memory is needed.
    cached = sum(int(statistics.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return int(_stated(folder / limit)) - (int(_stated(folder / usage)) - cached)


def memory_size(text: str) -> int:
    """Bytes from ``8GiB``, ``500MB`` or a plain number; for argparse.

    Raises:
        ArgumentTypeError: it is none of these, or not positive.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMG]I?)?B?", text.strip().upper())
    size_bytes = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size_bytes < 1:
        raise ArgumentTypeError(f"{text!r} is no amount of memory; write for instance 8GiB or 500MB")
    return size_bytes
