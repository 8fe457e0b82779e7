"""Torch's devices by the names that people type, and what memory is free on them."""

from __future__ import annotations

import torch

from step128_checkpoint.errors import ConfigurationError
from step128_checkpoint.memory import free_host_bytes


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the first GPU (CUDA's or ROCm's), if there is one, else the CPU.

    Raises:
        ConfigurationError: it is not known, or not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0  # ROCm's GPUs go by this name too
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigurationError(f"device {name!r} is not known; auto, cpu, cuda or cuda:N can be used") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device {name!r} cannot be used; auto, cpu, cuda or cuda:N can")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigurationError(f"device {name} was asked for, torch finds {count or 'no'} GPU. Use --device cpu.")
    return device


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; of the host, see :func:`free_host_bytes`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_bytes()
