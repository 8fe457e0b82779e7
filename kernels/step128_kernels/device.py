"""Which GPU a tensor is on, as tuned configs name it."""

from __future__ import annotations

from functools import cache

import torch

from step128_kernels.gpu import this_gpu


@cache
def _first_gpu() -> tuple[str, str]:
    gpu = this_gpu()
    return (gpu.name, gpu.arch) if gpu is not None else ("", "")


def gpu_identity(device: torch.device) -> tuple[str, str]:
    """``(name, arch)`` of a device: arch is empty on a CPU and on a GPU that is not AMD's. All GPUs of a machine are
    taken to be of one kind, as tensor parallelism needs.
    """
    return _first_gpu() if device.type == "cuda" else ("", "")
