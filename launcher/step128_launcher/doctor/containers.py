"""What a container, or a user without the right groups, is not allowed: device nodes and shared memory."""

import os
from pathlib import Path

from step128_launcher.doctor.context import Context
from step128_launcher.doctor.finding import Finding, failed, passed, skipped, warned
from step128_launcher.machine.types import AMD
from step128_launcher.sizes import format_bytes

_MIB, _GIB = 2**20, 2**30
# With P2P off the ranks exchange data through /dev/shm; assumed from AMD's documented --shm-size 16G, not measured.
_SHM_BYTES = 8 * _GIB
# Names that RCCL, vLLM and Python's multiprocessing give their segments.
_SEGMENTS = ("nccl-", "psm_", "sem.mp-", "torch_", "vllm")
_LEFT_BYTES = 64 * _MIB


def check_devices(context: Context) -> Finding:
    """Whether this process may open the nodes that the GPU runtime opens."""
    name = "device-nodes"
    hardware = context.hardware
    if not hardware.gpus and not hardware.has_gpu:
        return skipped(name, "no GPU")
    nodes = {node.path: node for node in hardware.device_nodes}
    wanted = {gpu.render_node for gpu in hardware.usable_gpus if gpu.render_node is not None}
    wanted |= {"/dev/kfd"} if any(gpu.vendor == AMD for gpu in hardware.gpus) else {"/dev/nvidiactl"}
    missing = sorted(wanted - nodes.keys())
    if missing:
        return failed(name, f"{', '.join(missing)} not there", _give_devices(context))
    denied = [nodes[path] for path in sorted(wanted) if not nodes[path].accessible]
    if not denied:
        return passed(name, ", ".join(sorted(wanted)) + " can be opened")
    groups = sorted({node.group_id for node in denied})
    shown = ", ".join(f"{node.path} (group {node.group_id})" for node in denied)
    mine = ", ".join(map(str, hardware.groups)) or "unknown"
    return failed(name, f"not allowed to open {shown}; groups of this process: {mine}", _join_groups(context, groups))


def check_shared_memory(context: Context) -> Finding:
    """With direct transfers off, RCCL works through /dev/shm; docker's default of 64 MiB ends in a bus error."""
    name = "shared-memory"
    if len(context.hardware.usable_gpus) < 2:
        return skipped(name, "one GPU: the ranks have nobody to exchange data with")
    size = context.hardware.shm_bytes
    if size is None:
        return skipped(name, "the size of /dev/shm cannot be read")
    if size >= _SHM_BYTES:
        return passed(name, f"/dev/shm has {format_bytes(size)}")
    report = failed if size < _GIB else warned
    remedy = "docker: --shm-size 16g (compose: shm_size: 16g); host: `sudo mount -o remount,size=16G /dev/shm`"
    return report(name, f"/dev/shm has {format_bytes(size)}, of at least {format_bytes(_SHM_BYTES)} wanted", remedy)


def check_leftovers(context: Context) -> Finding:
    """Segments of killed servers stay in /dev/shm and take memory until somebody removes them."""
    name = "leaked-shared-memory"
    folder = context.root / "dev/shm"
    try:
        entries = [entry for entry in folder.iterdir() if entry.name.startswith(_SEGMENTS)]
        sizes = {entry.name: entry.stat().st_size for entry in entries}
    except OSError:
        return skipped(name, "/dev/shm cannot be listed")
    total = sum(sizes.values())
    if total <= _LEFT_BYTES:
        return passed(name, f"{len(sizes)} segments, {format_bytes(total)}")
    largest = sorted(sizes, key=lambda entry: -sizes[entry])[:3]
    return warned(
        name,
        f"{len(sizes)} segments of servers hold {format_bytes(total)} of /dev/shm ({', '.join(largest)}, …)",
        "If no server is running: rm " + " ".join(f"/dev/shm/{prefix}*" for prefix in ("nccl-", "psm_")),
    )


def check_caches(context: Context) -> Finding:
    """Compiled kernels are kept in these folders; without them a start takes a quarter of an hour longer."""
    name = "caches"
    if not context.is_live:
        return skipped(name, "a recorded machine's caches are not in its tree")
    folders = cache_folders(context)
    blocked = [str(folder) for folder in folders if not _writable(folder)]
    if blocked:
        remedy = "Give the user these folders, or set VLLM_CACHE_ROOT and TRITON_CACHE_DIR."
        return failed(name, f"not writable: {', '.join(blocked)}", remedy)
    if context.hardware.container:
        inside = [str(folder) for folder in folders if not _on_a_mount(folder)]
        if inside:
            remedy = "Mount a volume there (docker: -v step128-cache:FOLDER); what is inside goes with the container."
            return warned(name, f"in the container's own layer: {', '.join(inside)}", remedy)
    cold = [str(folder) for folder in folders if not folder.is_dir() or not any(folder.iterdir())]
    if cold:
        remedy = "Nothing to do: the first start fills them. It may take 15 to 30 minutes, and is no hang."
        return warned(name, f"still empty: {', '.join(cold)}", remedy)
    return passed(name, ", ".join(map(str, folders)))


def cache_folders(context: Context) -> list[Path]:
    """Return where vLLM (torch.compile's and its own) and Triton keep what they compile."""
    home = Path(context.environment.get("HOME") or Path.home())
    general = Path(context.environment.get("XDG_CACHE_HOME") or home / ".cache")
    vllm, _ = context.setting("VLLM_CACHE_ROOT")
    triton, _ = context.setting("TRITON_CACHE_DIR")
    return [Path(vllm) if vllm else general / "vllm", Path(triton) if triton else home / ".triton" / "cache"]


def _nearest(folder: Path) -> Path:
    """Return `folder`, or the nearest of its parents that exists."""
    return next(one for one in (folder, *folder.parents) if one.exists())


def _writable(folder: Path) -> bool:
    nearest = _nearest(folder)
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def _on_a_mount(folder: Path) -> bool:
    return _nearest(folder).stat().st_dev != Path("/").stat().st_dev


def _give_devices(context: Context) -> str:
    if context.hardware.container == "lxc":
        return "lxc: add /dev/kfd and /dev/dri to the container (lxc.mount.entry and lxc.cgroup2.devices.allow)."
    if context.hardware.container:
        return "docker run --device /dev/kfd --device /dev/dri (NVIDIA: --gpus all with its container toolkit)."
    return "`sudo modprobe amdgpu`, and see `sudo dmesg | grep amdgpu`; /dev/kfd needs a driver built with HSA_AMD."


def _join_groups(context: Context, groups: list[int]) -> str:
    numbers = " ".join(f"--group-add {group}" for group in groups)
    if context.hardware.container == "podman":
        return "podman run --group-add keep-groups (rootless podman knows no other), your user being in these groups."
    if context.hardware.container:
        return f"docker run {numbers}: numbers, since the image may not have the host's names."
    return "`sudo usermod -aG render,video $USER`, then log in again."
