"""What HIP_, ROCR_ and CUDA_VISIBLE_DEVICES hide from a process started here.

Sources: ROCm's "GPU isolation techniques", HIP's environment variables, CUDA's programming guide. ROCR_VISIBLE_DEVICES
acts first, on the compute driver's order of GPUs; HIP_VISIBLE_DEVICES (or, if it is not set, CUDA_VISIBLE_DEVICES, or
else GPU_DEVICE_ORDINAL) then counts what is left. Each entry is an index or a GPU-… identifier; a list ends at its
first entry that names no GPU. A form that is not understood hides nothing here, and is noted.
"""

from collections.abc import Mapping
from dataclasses import replace

from step128_launcher.machine.reader import whole_number
from step128_launcher.machine.types import AMD, NVIDIA, Gpu

VARIABLES = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
_HIP_VARIABLES = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


def read_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return those of the variables that are set."""
    return {name: environment[name] for name in VARIABLES if name in environment}


def hide_gpus(gpus: tuple[Gpu, ...], variables: Mapping[str, str], notes: list[str]) -> tuple[Gpu, ...]:
    """Return the GPUs with `visible` False for those the variables hide."""
    amd = [gpu for gpu in gpus if gpu.vendor == AMD and gpu.visible]
    nvidia = [gpu for gpu in gpus if gpu.vendor == NVIDIA]
    kept: list[Gpu] = []
    if amd:
        kept += _hip_gpus(amd, variables, notes)
    if nvidia:
        kept += _cuda_gpus(nvidia, variables, notes)
    return tuple(gpu if gpu in kept else replace(gpu, visible=False) for gpu in gpus)


def hip_order(gpus: tuple[Gpu, ...]) -> list[Gpu]:
    """Return the AMD GPUs that the compute driver knows, in its order: the one HIP's indices count."""
    known = [gpu for gpu in gpus if gpu.vendor == AMD and gpu.kfd_node is not None]
    return sorted(known, key=lambda gpu: gpu.kfd_node or 0)


def _hip_gpus(gpus: list[Gpu], variables: Mapping[str, str], notes: list[str]) -> list[Gpu]:
    used = ["ROCR_VISIBLE_DEVICES"] if "ROCR_VISIBLE_DEVICES" in variables else []
    # HIP takes an empty text as "not set"; the layer below it takes it as "none".
    used += [name for name in _HIP_VARIABLES if variables.get(name)][:1]
    if not used:
        return gpus
    ordered = hip_order(tuple(gpus))
    if not ordered:
        notes.append(f"{used[0]}: the compute driver's order of the GPUs is not known, so it is taken to hide none")
        return gpus
    for name in used:
        ordered = _select(name, variables[name], ordered, notes)
    return ordered


def _cuda_gpus(gpus: list[Gpu], variables: Mapping[str, str], notes: list[str]) -> list[Gpu]:
    value = variables.get("CUDA_VISIBLE_DEVICES")
    return gpus if value is None else _select("CUDA_VISIBLE_DEVICES", value, gpus, notes)


def _select(name: str, value: str, gpus: list[Gpu], notes: list[str]) -> list[Gpu]:
    """Return the GPUs that `value` names, in the order of `gpus`."""
    chosen: list[Gpu] = []
    for entry in filter(None, (part.strip() for part in value.split(","))):
        index = whole_number(entry)
        if index is None and not entry.upper().startswith("GPU-"):
            notes.append(f"{name}: {entry!r} is neither an index nor GPU-…, so it is taken to hide none")
            return gpus
        if index is None:
            found = [gpu for gpu in gpus if _has_id(gpu, entry)]
            if len(found) != 1 and any(gpu.unique_id is None for gpu in gpus):
                notes.append(f"{name}: {entry!r} cannot be told from the GPUs' ids, so it is taken to hide none")
                return gpus
        else:
            found = gpus[index : index + 1] if index >= 0 else []
        if not found:
            break
        chosen += found[:1]
    return [gpu for gpu in gpus if gpu in chosen]


def _has_id(gpu: Gpu, entry: str) -> bool:
    """Whether `entry`, GPU-… or its beginning, is this GPU's id; sysfs writes it without the prefix."""
    own = (gpu.unique_id or "").lower().removeprefix("0x").removeprefix("gpu-")
    wanted = entry.lower().removeprefix("gpu-")
    return bool(wanted) and own.startswith(wanted)
