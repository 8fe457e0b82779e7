"""What is around the GPUs: swap, shared memory, TTM limits, kernel, versions, container, device nodes, groups.

Sources: proc(5), proc_pid_status(5); the kernel's drivers/gpu/drm/ttm (`pages_limit`, in pages of the CPU: 4 KiB on
x86-64, where these drivers run); the marker files of docker, podman and systemd's container interface.
"""

import os
import re
from pathlib import Path

from step128_launcher.machine.reader import Reader, exists, whole_number
from step128_launcher.machine.types import DeviceNode, TtmLimit

RECORDED_SHM = "commands/shm_bytes"
_PAGE_BYTES = 4096
_MAX_PAGES = 2**34  # 64 TiB
_DEVICE_NODES = re.compile(r"renderD\d+|nvidia\d+|nvidiactl|nvidia-uvm|kfd")


def read_ttm_limits(reader: Reader) -> tuple[TtmLimit, ...]:
    """Return the limit of each loaded TTM module: the kernel's `ttm`, or `amdttm` of AMD's own driver package."""
    limits = []
    for module in ("ttm", "amdttm"):
        path = reader.root / "sys/module" / module / "parameters/pages_limit"
        pages = reader.integer(path, minimum=1, maximum=_MAX_PAGES)
        if pages is not None:
            limits.append(TtmLimit(module, pages * _PAGE_BYTES))
    return tuple(limits)


def read_shm_bytes(reader: Reader) -> int | None:
    """Return the size of /dev/shm; a recorded tree holds it as a number in commands/shm_bytes."""
    if reader.root != Path("/"):
        return reader.integer(reader.root / RECORDED_SHM)
    try:
        found = os.statvfs("/dev/shm")
    except OSError as error:
        reader.note(Path("/dev/shm"), error.strerror or type(error).__name__)
        return None
    return found.f_frsize * found.f_blocks


def read_versions(reader: Reader) -> dict[str, str]:
    """Return name -> version of what the machine's GPU stack says about itself.

    `amdgpu` has a version only as AMD's driver package; the kernel's own has the kernel's. `librccl` is the suffix of
    the library's file name, for example 1.0.70201 for RCCL of ROCm 7.2.1.
    """
    root = reader.root
    found = {
        "amdgpu": reader.text(root / "sys/module/amdgpu/version"),
        "rocm": reader.text(root / "opt/rocm/.info/version"),
    }
    libraries = [name for name in reader.names(root / "opt/rocm/lib") if re.fullmatch(r"librccl\.so(\.\d+){2,}", name)]
    if libraries:
        found["librccl"] = max(libraries, key=len).removeprefix("librccl.so.")
    return {name: version for name, version in found.items() if version}


def read_container(reader: Reader) -> str | None:
    """Return "docker", "podman", "kubernetes", "lxc" or what systemd's interface names; None outside of a container."""
    root = reader.root
    if exists(root / "run/.containerenv"):
        return "podman"
    if exists(root / ".dockerenv"):
        return "docker"
    if exists(root / "var/run/secrets/kubernetes.io"):
        return "kubernetes"
    kind = reader.text(root / "run/systemd/container")
    if kind:
        return kind.split()[0]
    return "lxc" if exists(root / "dev/lxc") or exists(root / "dev/.lxc") else None


def read_device_nodes(reader: Reader) -> tuple[DeviceNode, ...]:
    """Return the device nodes that GPU runtimes open, with their group and whether this process may use them."""
    nodes = []
    for folder in ("dev", "dev/dri"):
        for name in reader.names(reader.root / folder):
            path = reader.root / folder / name
            if not _DEVICE_NODES.fullmatch(name):
                continue
            try:
                group = path.stat().st_gid
            except OSError as error:
                reader.note(path, error.strerror or type(error).__name__)
                continue
            nodes.append(DeviceNode(f"/{folder}/{name}", group, os.access(path, os.R_OK | os.W_OK)))
    return tuple(nodes)


def read_groups(reader: Reader) -> tuple[int, ...]:
    """Return the numbers of the groups of this process, supplementary ones included."""
    path = reader.root / "proc/self/status"
    groups: set[int] = set()
    for line in (reader.text(path) or "").splitlines():
        name, _, rest = line.partition(":")
        if name in ("Gid", "Groups"):
            numbers = [whole_number(word) for word in rest.split()]
            groups |= {number for number in numbers if number is not None}
            if None in numbers:
                reader.note(path, f"{line[:60]!r} is no list of groups")
    return tuple(sorted(groups))
