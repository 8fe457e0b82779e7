"""Carry out a launch with real tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from step128_kernels.launch import Launch


def is_amd(tensor: torch.Tensor) -> bool:
    """Whether AMD's assembly can run on the tensor's device."""
    return tensor.is_cuda and torch.version.hip is not None


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
