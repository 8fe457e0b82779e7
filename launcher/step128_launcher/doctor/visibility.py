"""Which GPUs the server would use, and whether that is what was meant."""

from step128_launcher.doctor.context import Context, addresses, why_no_cards
from step128_launcher.doctor.finding import Finding, failed, passed, skipped, warned
from step128_launcher.machine.types import AMD
from step128_launcher.machine.visibility import VARIABLES, hip_order

_RANKS = (1, 2, 4, 8)


def check_unreadable(context: Context) -> Finding:
    """Files that were there and could not be used: whatever is concluded without them may be wrong."""
    name = "probe"
    lines = context.hardware.unreadable
    if not lines:
        return passed(name, "everything that is there could be read")
    more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
    return warned(
        name,
        "; ".join(lines[:4]) + more,
        "A suspended or resetting GPU recovers by itself: run this again. EPERM in a container: pass the GPU's "
        "render node and /dev/kfd (--device).",
    )


def check_gpus(context: Context) -> Finding:
    """Whether a GPU is there and usable at all."""
    name = "gpus"
    hardware = context.hardware
    usable = hardware.usable_gpus
    if usable:
        return passed(name, ", ".join(f"{gpu.pci_address} {gpu.name} ({gpu.target or '?'})" for gpu in usable))
    if hardware.gpus:
        variables = ", ".join(f"{key}={value}" for key, value in hardware.visible_devices.items())
        return failed(
            name,
            f"all GPUs ({addresses(hardware.gpus)}) are hidden, by {variables or 'the device rules of this container'}",
            "Unset the variable, or pass /dev/kfd and /dev/dri to the container.",
        )
    if hardware.has_gpu:
        return failed(
            name,
            "the driver's device node is there, but no GPU is to be found below /sys/class/drm or by nvidia-smi",
            "Look into `sudo dmesg | grep -iE 'amdgpu|nvrm'`: the driver failed to start the GPU, or has no firmware.",
        )
    return skipped(name, "no GPU and no GPU driver; the CPU would serve")


def check_variables(context: Context) -> Finding:
    """Two of the variables at once filter one after the other; ranks that disagree hang in RCCL."""
    name = "visible-devices"
    if not any(gpu.vendor == AMD for gpu in context.hardware.gpus):
        return skipped(name, "no AMD GPU")
    given = {key: value for key, value in context.hardware.visible_devices.items() if value}
    if not given:
        return passed(name, f"none of {', '.join(VARIABLES)} is set")
    shown = ", ".join(f"{key}={value}" for key, value in given.items())
    misread = [line for line in context.hardware.unreadable if line.startswith(VARIABLES)]
    if misread:
        return warned(
            name, "; ".join(misread), "Use indices in HIP's order, or GPU-… identifiers as rocminfo shows them."
        )
    later = {key: value for key, value in given.items() if key != "ROCR_VISIBLE_DEVICES"}
    if len(set(later.values())) > 1:
        return failed(
            name,
            f"{shown}: they name different GPUs, and each library follows another",
            "Set HIP_VISIBLE_DEVICES only.",
        )
    if "ROCR_VISIBLE_DEVICES" in given and later:
        wanted = len(next(iter(later.values())).split(","))
        seen = len(context.amd)
        evidence = f"{shown}: the second counts what the first leaves, {seen} of the {wanted} GPUs it names"
        report = failed if seen != wanted else warned
        return report(name, evidence, "Unset ROCR_VISIBLE_DEVICES, or name the GPUs in it alone.")
    return passed(name, f"{shown}: {len(context.amd)} GPUs")


def check_integrated(context: Context) -> Finding:
    """An integrated GPU among the cards becomes a rank with a fraction of the memory and another target."""
    name = "integrated-gpu"
    small = tuple(gpu for gpu in context.amd if gpu.integrated)
    if not small or not context.cards:
        return (
            passed(name, "no mix of cards and integrated GPUs") if context.amd else skipped(name, "no usable AMD GPU")
        )
    order = hip_order(context.hardware.gpus)
    indices = ",".join(str(index) for index, gpu in enumerate(order) if gpu in context.cards)
    if indices and not context.hardware.visible_devices:
        return passed(
            name,
            f"{addresses(small)} ({small[0].name}) is integrated; `step128 serve` sets HIP_VISIBLE_DEVICES={indices}, "
            "so that only the cards are used",
        )
    return failed(
        name,
        f"{addresses(small)} ({small[0].name}) is integrated and would be used beside {addresses(context.cards)}",
        f"export HIP_VISIBLE_DEVICES={indices} (HIP's order), or turn the integrated GPU off in the firmware setup."
        if indices
        else "Turn the integrated GPU off in the firmware setup.",
    )


def check_order(context: Context) -> Finding:
    """HIP's indices follow the compute driver's order, those of other tools the PCI addresses."""
    name = "gpu-order"
    order = hip_order(context.hardware.gpus)
    if len(order) < 2:
        return skipped(name, "fewer than two GPUs with a known place in HIP's order")
    shown = ", ".join(f"{index} = {gpu.pci_address}" for index, gpu in enumerate(order))
    if [gpu.pci_address for gpu in order] == sorted(gpu.pci_address for gpu in order):
        return passed(name, f"HIP's order is that of the PCI addresses: {shown}")
    return warned(
        name,
        f"HIP's order is not that of the PCI addresses: {shown}",
        "Tell the cards apart by their PCI address (rocm-smi --showbus), never by another tool's index.",
    )


def check_rank_count(context: Context) -> Finding:
    """The model divides among 1, 2, 4 or 8 ranks only: 64 and 96 query heads, 8 key-value heads."""
    name = "gpu-count"
    count = len(context.discrete)
    if not count:
        return skipped(name, why_no_cards(context))
    if count in _RANKS:
        return passed(name, f"cards: {count}, which divides the model's 64, 96 and 8 heads evenly")
    used = max(ranks for ranks in _RANKS if ranks <= count)
    return warned(
        name, f"{count} cards, of which only {used} can be used", "The model divides among 1, 2, 4 or 8 cards."
    )
