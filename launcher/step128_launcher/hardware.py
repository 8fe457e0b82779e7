"""What this machine has, read from files below an injectable root, so that recorded trees can stand in for machines.

Sources: proc_meminfo(5), proc_pid_status(5); control groups in cgroup.py; GPUs and the rest in machine/.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.amd import read_amd_gpus
from step128_launcher.machine.cgroup import read_cgroup
from step128_launcher.machine.host import (
    read_container,
    read_device_nodes,
    read_groups,
    read_shm_bytes,
    read_ttm_limits,
    read_versions,
)
from step128_launcher.machine.nvidia import read_nvidia_gpus
from step128_launcher.machine.reader import Reader, exists, whole_number
from step128_launcher.machine.types import Hardware
from step128_launcher.machine.visibility import hide_gpus, read_variables

_MAX_CPUS = 2**16


def probe(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Hardware:
    """Read the machine below `root`, as a process with `environment` may use it.

    A figure that cannot be read is None, with a line in `unreadable` if something was there; it raises nothing.

    Raises:
        LauncherError: 4, if /proc/meminfo cannot be read or lacks what every Linux since 3.14 has.

    """
    reader = Reader(root)
    meminfo = _meminfo(reader)
    cgroup = read_cgroup(root)
    available = meminfo["MemAvailable"]
    if cgroup.memory_headroom_bytes is not None:
        available = min(available, cgroup.memory_headroom_bytes)
    variables = read_variables(environment)
    has_nvidia = exists(root / "dev/nvidiactl")
    amd = read_amd_gpus(reader)
    nvidia, nvidia_versions = read_nvidia_gpus(reader, has_nvidia)
    return Hardware(
        cpu_ids=_affinity(reader),
        cpu_quota=cgroup.cpu_quota,
        memory_total_bytes=meminfo["MemTotal"],
        memory_available_bytes=available,
        cgroup_limit_bytes=cgroup.memory_limit_bytes,
        cgroup_version=cgroup.version,
        has_amd_gpu=exists(root / "dev/kfd"),
        has_nvidia_gpu=has_nvidia,
        gpus=hide_gpus(amd.gpus + nvidia, variables, reader.notes),
        ttm_limits=read_ttm_limits(reader),
        swap_total_bytes=meminfo.get("SwapTotal", 0),
        swap_free_bytes=meminfo.get("SwapFree", 0),
        shm_bytes=read_shm_bytes(reader),
        kernel_release=reader.text(reader.root / "proc/sys/kernel/osrelease"),
        kernel_command_line=reader.text(reader.root / "proc/cmdline"),
        firmware=read_versions(reader) | amd.firmware | nvidia_versions,
        container=read_container(reader),
        device_nodes=read_device_nodes(reader),
        groups=read_groups(reader),
        visible_devices=variables,
        unreadable=tuple(dict.fromkeys(reader.notes)),
    )


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Return the CPU numbers of the kernel's list format, for example "0-2,5" -> (0, 1, 2, 5).

    Raises:
        ValueError: if it is no such list.

    """
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        start, end = whole_number(first), whole_number(last if dash else first)
        if start is None or end is None or not 0 <= start <= end < _MAX_CPUS:
            raise ValueError(f"{part[:20]!r} is no range of CPUs")
        cpus.extend(range(start, end + 1))
    return tuple(cpus)


def _meminfo(reader: Reader) -> dict[str, int]:
    """Return the file's figures in bytes; the kernel writes "kB" and means KiB."""
    path = reader.root / "proc/meminfo"
    values: dict[str, int] = {}
    for line in (reader.text(path) or "").splitlines():
        key, _, rest = line.partition(":")
        fields = rest.split()
        number = whole_number(fields[0]) if fields else None
        if number is not None and number >= 0:
            values[key] = number * 1024
    if "MemTotal" not in values or "MemAvailable" not in values:
        raise LauncherError(
            ExitCode.UNSUPPORTED_HARDWARE,
            f"{path} does not give MemTotal and MemAvailable, so the memory cannot be planned.",
            "step128 needs Linux with /proc mounted.",
        )
    return values


def _affinity(reader: Reader) -> tuple[int, ...]:
    path = reader.root / "proc/self/status"
    for line in (reader.text(path) or "").splitlines():
        if line.startswith("Cpus_allowed_list:"):
            try:
                return parse_cpu_list(line.partition(":")[2])
            except ValueError as error:
                reader.note(path, str(error))
    return tuple(range(os.cpu_count() or 1))
