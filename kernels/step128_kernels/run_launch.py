"""Carry out a launch with real tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch

from step128_kernels.launch import Launch

_ASSEMBLY_ARCHS = ("gfx11", "gfx12")  # RDNA3, 3.5 and 4; AMD's other GPUs have no v_dot2_f32_bf16


@lru_cache(maxsize=16)
def _arch(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip is None:
        return ""
    return str(torch.cuda.get_device_properties(device).gcnArchName)


def uses_assembly(x: torch.Tensor) -> bool:
    """Whether AMD's assembly is for these activations: its GPU has the instructions, and they are of 16 bits."""
    return x.element_size() == 2 and _arch(x.device).startswith(_ASSEMBLY_ARCHS)


def run(launch: Launch, tensors: Mapping[str, torch.Tensor]) -> None:
    """Launch a kernel on the current stream of the tensors' device.

    Args:
        launch: what to launch.
        tensors: one for every name in ``launch.pointers``; an element type "i64" over narrower data is a view.
    """
    arguments = {
        name: tensors[name].view(torch.int64) if pointer.dtype == "i64" else tensors[name]
        for name, pointer in launch.pointers.items()
    }
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if launch.waves_per_eu and torch.version.hip is not None:
        options["waves_per_eu"] = launch.waves_per_eu
    launch.function[launch.grid](**arguments, **launch.scalars, **launch.constants, **options)
