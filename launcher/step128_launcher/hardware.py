"""What this machine has, read from files below an injectable root, so that recorded trees can stand in for machines.

Sources: proc_meminfo(5), proc_pid_status(5); control groups in cgroup.py.
"""

import os
from pathlib import Path

from step128_launcher.cgroup import read_cgroup, read_text
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import Hardware


def probe(root: Path = Path("/")) -> Hardware:
    """Read the machine below `root`.

    Raises:
        LauncherError: 4, if /proc/meminfo cannot be read or lacks what every Linux since 3.14 has.

    """
    meminfo = _meminfo(root / "proc/meminfo")
    cgroup = read_cgroup(root)
    available = meminfo["MemAvailable"]
    if cgroup.memory_headroom_bytes is not None:
        available = min(available, cgroup.memory_headroom_bytes)
    return Hardware(
        cpu_ids=_affinity(root),
        cpu_quota=cgroup.cpu_quota,
        memory_total_bytes=meminfo["MemTotal"],
        memory_available_bytes=available,
        cgroup_limit_bytes=cgroup.memory_limit_bytes,
        cgroup_version=cgroup.version,
        has_amd_gpu=(root / "dev/kfd").exists(),
        has_nvidia_gpu=(root / "dev/nvidiactl").exists(),
    )


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Return the CPU numbers of the kernel's list format, for example "0-2,5" -> (0, 1, 2, 5)."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)


def _meminfo(path: Path) -> dict[str, int]:
    """Return the file's figures in bytes; the kernel writes "kB" and means KiB."""
    values: dict[str, int] = {}
    for line in (read_text(path) or "").splitlines():
        key, _, rest = line.partition(":")
        fields = rest.split()
        if fields and fields[0].isdigit():
            values[key] = int(fields[0]) * 1024
    if "MemTotal" not in values or "MemAvailable" not in values:
        raise LauncherError(
            ExitCode.UNSUPPORTED_HARDWARE,
            f"{path} does not give MemTotal and MemAvailable, so the memory cannot be planned.",
            "step128 needs Linux with /proc mounted.",
        )
    return values


def _affinity(root: Path) -> tuple[int, ...]:
    for line in (read_text(root / "proc/self/status") or "").splitlines():
        if line.startswith("Cpus_allowed_list:"):
            return parse_cpu_list(line.partition(":")[2])
    return tuple(range(os.cpu_count() or 1))
