"""What /proc tells about the server's processes; files and units: proc(5). A process that just ended is left out."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")
_UTIME, _STIME = 11, 12  # fields of stat after the process name, as proc_pid_stat(5) numbers them less 3
_EVIDENCE = ("status", "wchan", "stack")


def group_members(group: int, proc: Path = PROC) -> list[int]:
    """Return the processes of a group that still run."""
    members = []
    for stat in proc.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state not in "ZX":
                members.append(int(stat.parent.name))
    return sorted(members)


def cpu_seconds(pids: Iterable[int], proc: Path = PROC) -> float:
    """Return the CPU time these processes have used since they started, in user and kernel mode together."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = (proc / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
            ticks += int(fields[_UTIME]) + int(fields[_STIME])
    return ticks / os.sysconf("SC_CLK_TCK")


def mapped_bytes(pid: int, suffix: str, proc: Path = PROC) -> int:
    """Return the bytes of files ending in `suffix` that a process has mapped and touched (smaps: Rss)."""
    kib, wanted = 0, False
    with contextlib.suppress(OSError):
        for line in (proc / str(pid) / "smaps").read_text(errors="replace").splitlines():
            if line.startswith("Rss:"):
                kib += int(line.split()[1]) if wanted else 0
            elif "-" in line.partition(" ")[0]:  # "7f00-7f10 r--p 00000000 08:01 42 /path": a new mapping
                wanted = line.endswith(suffix)
    return kib * 1024


def oom_kills(proc: Path = PROC) -> int | None:
    """Return how often the kernel has killed a process for want of memory since boot (vmstat), None if unknown."""
    with contextlib.suppress(OSError, ValueError):
        for line in (proc / "vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def evidence(pids: Iterable[int], proc: Path = PROC) -> str:
    """Return what the kernel shows of these processes: state, where they wait, and their kernel stack if readable."""
    parts = []
    for pid in pids:
        for name in _EVIDENCE:
            try:
                text = (proc / str(pid) / name).read_text(errors="replace").rstrip()
            except OSError as error:
                text = f"not readable: {error.strerror}"
            parts.append(f"== {pid} {name}\n{text}")
    return "\n".join(parts) + "\n"
