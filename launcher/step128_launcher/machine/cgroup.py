"""Limits of the control group this process runs in: memory headroom and CPU quota, cgroup v2 and v1.

Sources: cgroups(7); the kernel's cgroup-v2 document (memory.max, memory.current, memory.stat, cpu.max) and its
cgroup-v1 memory document (memory.limit_in_bytes, memory.usage_in_bytes).
"""

from dataclasses import dataclass
from pathlib import Path

from step128_launcher.machine.reader import exists, whole_number

# cgroup v1 has no word for "no limit": it reports the largest multiple of a page, close to 2^63.
_V1_UNLIMITED_BYTES = 2**60


@dataclass(frozen=True)
class Cgroup:
    """What the group and its ancestors allow; None where nothing limits.

    `memory_headroom_bytes` is the least, over all levels, of the limit less what cannot be dropped of the usage there.
    """

    version: int | None
    memory_limit_bytes: int | None
    memory_headroom_bytes: int | None
    cpu_quota: float | None


def read_cgroup(root: Path) -> Cgroup:
    """Read the group of the process whose /proc/self/cgroup lies below `root`."""
    mount = root / "sys/fs/cgroup"
    paths = _own_paths(root / "proc/self/cgroup")
    if exists(mount / "cgroup.controllers"):
        levels = _levels(mount, paths.get(""))
        limit, headroom = _memory(levels, "memory.max", "memory.current", "inactive_file")
        return Cgroup(2, limit, headroom, min(filter(None, map(_quota_v2, levels)), default=None))
    if exists(mount / "memory/memory.limit_in_bytes"):
        levels = _levels(mount / "memory", paths.get("memory"))
        limit, headroom = _memory(levels, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        quotas = map(_quota_v1, _levels(mount / "cpu", paths.get("cpu")))
        return Cgroup(1, limit, headroom, min(filter(None, quotas), default=None))
    return Cgroup(None, None, None, None)


def read_text(path: Path) -> str | None:
    """Return the file's text, or None: an absent or unreadable file means the kernel does not offer this figure."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _own_paths(path: Path) -> dict[str, str]:
    """Return controller -> path of our group; the controller of cgroup v2 is the empty text."""
    paths: dict[str, str] = {}
    for line in (read_text(path) or "").splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3:
            for controller in fields[1].split(","):
                paths[controller] = fields[2]
    return paths


def _levels(mount: Path, own: str | None) -> list[Path]:
    """Return the folders of our group and of its ancestors: each of them binds.

    In a container the path may be the host's and not exist here; the mount's root then is our own group.
    """
    levels = [mount]
    for part in Path(own or "/").parts[1:]:
        if not exists(levels[-1] / part):
            return [mount]
        levels.append(levels[-1] / part)
    return levels


def _memory(levels: list[Path], limit_name: str, usage_name: str, droppable: str) -> tuple[int | None, int | None]:
    """Return the tightest limit and the least headroom, in bytes, over all levels."""
    limits: list[int] = []
    headrooms: list[int] = []
    for level in levels:
        limit = _number(level / limit_name)
        if limit is None or limit >= _V1_UNLIMITED_BYTES:
            continue
        # The inactive page cache counts as usage, but the kernel drops it before it refuses memory.
        used = max(0, (_number(level / usage_name) or 0) - _stat(level / "memory.stat", droppable))
        limits.append(limit)
        headrooms.append(max(0, limit - used))
    return min(limits, default=None), min(headrooms, default=None)


def _number(path: Path) -> int | None:
    number = whole_number((read_text(path) or "").strip())
    return number if number is not None and number >= 0 else None


def _stat(path: Path, key: str) -> int:
    for line in (read_text(path) or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return max(0, whole_number(value.strip()) or 0)
    return 0


def _quota_v2(level: Path) -> float | None:
    fields = (read_text(level / "cpu.max") or "").split()
    quota, period = map(whole_number, fields) if len(fields) == 2 else (None, None)
    return quota / period if quota and period and min(quota, period) > 0 else None


def _quota_v1(level: Path) -> float | None:
    quota, period = _number(level / "cpu.cfs_quota_us"), _number(level / "cpu.cfs_period_us")
    return quota / period if quota and period else None
