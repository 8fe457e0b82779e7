"""What a container, or a user without the right groups, is not allowed: device nodes and shared memory."""

from step128_launcher.doctor.context import Context
from step128_launcher.doctor.finding import Finding, failed, passed, skipped, warned
from step128_launcher.machine.types import AMD, NVIDIA
from step128_launcher.sizes import format_bytes

_MIB, _GIB = 2**20, 2**30
# With P2P off the ranks exchange data through /dev/shm; assumed from AMD's documented --shm-size 16G, not measured.
_SHM_BYTES = 8 * _GIB
# vLLM's CPU ranks exchange data through it too (csrc/cpu/shm.cpp, and the queue of requests); assumed, not measured.
_CPU_SHM_BYTES = _GIB
# Names that RCCL, vLLM and Python's multiprocessing give their segments.
_SEGMENTS = ("nccl-", "psm_", "sem.mp-", "torch_", "vllm")
_LEFT_BYTES = 64 * _MIB


def check_devices(context: Context) -> Finding:
    """Whether this process may open the nodes that the GPU runtime opens.

    That is every node of the runtime, those of GPUs hidden by a variable included: ROCm opens all before it filters.
    """
    name = "device-nodes"
    hardware = context.hardware
    if not hardware.gpus and not hardware.has_gpu:
        return skipped(name, "no GPU")
    nodes = {node.path: node for node in hardware.device_nodes}
    vendors = {gpu.vendor for gpu in hardware.gpus}
    needed = {gpu.render_node for gpu in hardware.usable_gpus if gpu.render_node is not None}
    needed |= {"/dev/kfd"} if AMD in vendors or hardware.has_amd_gpu else set()
    needed |= {"/dev/nvidiactl"} if NVIDIA in vendors or hardware.has_nvidia_gpu else set()
    missing = sorted(needed - nodes.keys())
    if missing:
        return failed(name, f"{', '.join(missing)} not there", _give_devices(context))
    own_render = {gpu.render_node for gpu in hardware.gpus}
    # A render node of none of these GPUs is another vendor's, or one that CUDA does not open.
    opened = {path for path in nodes if path in own_render or "/dri/" not in path}
    denied = [nodes[path] for path in sorted(opened) if not nodes[path].accessible]
    if not denied:
        return passed(name, ", ".join(sorted(opened)) + " can be opened")
    groups = sorted({node.group_id for node in denied})
    shown = ", ".join(f"{node.path} (group {node.group_id})" for node in denied)
    mine = ", ".join(map(str, hardware.groups)) or "unknown"
    return failed(name, f"not allowed to open {shown}; groups of this process: {mine}", _let_open(context, groups))


def check_shared_memory(context: Context) -> Finding:
    """With direct transfers off, RCCL works through /dev/shm; docker's default of 64 MiB ends in a bus error."""
    name = "shared-memory"
    gpus = context.hardware.usable_gpus
    if len(gpus) == 1:
        return skipped(name, "one GPU and so one rank: nothing is exchanged")
    size = context.hardware.shm_bytes
    if size is None:
        return skipped(name, "the size of /dev/shm cannot be read")
    wanted = _SHM_BYTES if gpus else _CPU_SHM_BYTES
    whose = "" if gpus else "; ranks on the CPU (--tensor-parallel-size 2 or more) exchange data through it"
    if size >= wanted:
        return passed(name, f"/dev/shm has {format_bytes(size)}{whose}")
    # On the CPU one rank is the rule, and needs none.
    report = failed if gpus and size < _GIB else warned
    remedy = "docker: --shm-size 16g (compose: shm_size: 16g); host: `sudo mount -o remount,size=16G /dev/shm`"
    return report(name, f"/dev/shm has {format_bytes(size)}, of at least {format_bytes(wanted)} wanted{whose}", remedy)


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


def _give_devices(context: Context) -> str:
    if context.hardware.container == "lxc":
        return "lxc: add /dev/kfd and /dev/dri to the container (lxc.mount.entry and lxc.cgroup2.devices.allow)."
    if context.hardware.container:
        return "docker run --device /dev/kfd --device /dev/dri (NVIDIA: --gpus all with its container toolkit)."
    return "`sudo modprobe amdgpu`, and see `sudo dmesg | grep amdgpu`; /dev/kfd needs a driver built with HSA_AMD."


def _let_open(context: Context, groups: list[int]) -> str:
    """Return how to get at nodes of these groups (their numbers)."""
    kind = context.hardware.container
    if kind and set(groups) <= set(context.hardware.groups):
        return "The groups are there, so it is the container's device rules that refuse: " + _give_devices(context)
    numbers = " ".join(f"--group-add {group}" for group in groups)
    if kind == "podman":
        return (
            "podman run --group-add keep-groups (rootless podman knows no other); your user on the host must be in "
            f"the groups {', '.join(map(str, groups))}."
        )
    if kind == "lxc":
        entries = "; ".join(f"`groupadd -g {group} gpu{group}; usermod -aG {group} USER`" for group in groups)
        return f"Inside of the container: {entries}; unprivileged, also map each group in lxc.idmap and /etc/subgid."
    if kind:
        return f"docker run {numbers} (compose: group_add): numbers, since the image may not have the host's names."
    if groups == [0]:
        return "They are root's alone: install the driver package's udev rules (group render, mode 0660), or reboot."
    names = f"$(getent group {' '.join(map(str, groups))} | cut -d: -f1 | paste -sd,)"
    return f"`sudo usermod -aG {names} $USER` (usually the groups render and video), then log in again."
