"""NL4 weights of a vLLM layer, in the checkpoint's order or in the kernels'.

Weights are loaded as ``*_packed`` and ``*_scale``. On a GPU they are then replaced by ``*_tiles`` and ``*_scales``
(:mod:`step128_kernels.nl4_layout`); on a CPU they stay, unless the variable below asks for the kernels' order there.
"""

from __future__ import annotations

import os

import torch

from step128_kernels.nl4_arguments import codebook_table
from step128_kernels.nl4_layout import to_kernel_layout
from step128_kernels.torch_codebook import dequantize

KERNEL_LAYOUT_VARIABLE = "STEP128_KERNEL_LAYOUT"
"""``1``: reorder weights on a CPU too, and compute from there in torch: a slow test of all but the kernels themselves.

vLLM's compile cache does not know the variable: switch that off too (``VLLM_DISABLE_COMPILE_CACHE=1``).
"""


def use_kernel_layout(layer: torch.nn.Module, *prefixes: str) -> None:
    """Replace ``<prefix>_packed``, ``<prefix>_scale`` by ``<prefix>_tiles``, ``<prefix>_scales`` where that is due.

    A layer that has been through this is left as it is. The old parameters are freed one weight at a time.

    Args:
        layer: with its weights loaded.
        prefixes: of the layer's weights.
    """
    own = _own_parameters(layer)
    for prefix in prefixes:
        packed, scale = own.pop(f"{prefix}_packed", None), own.pop(f"{prefix}_scale", None)
        if packed is None or scale is None or not _is_due(packed.device):
            continue
        tiles, scales = to_kernel_layout(packed.data, scale.data)
        delattr(layer, f"{prefix}_packed")
        delattr(layer, f"{prefix}_scale")
        layer.register_parameter(f"{prefix}_tiles", torch.nn.Parameter(tiles, requires_grad=False))
        layer.register_parameter(f"{prefix}_scales", torch.nn.Parameter(scales, requires_grad=False))
        _make_tables(tiles.device)


def in_kernel_layout(layer: torch.nn.Module, prefix: str) -> bool:
    """Whether a weight is in the kernels' order."""
    return hasattr(layer, f"{prefix}_tiles")


def weight_path(layer: torch.nn.Module, prefix: str) -> str | None:
    """What computes with a loaded weight: ``triton`` if it is in the kernels' order and on a GPU, else ``torch``.

    ``torch`` is the reference, on a GPU as well: from the checkpoint's order nothing else computes. None for a layer
    that holds no such weight.
    """
    if weight_order(layer, prefix) is None:
        return None
    tiles = _own_parameters(layer).get(f"{prefix}_tiles")
    return "triton" if tiles is not None and tiles.is_cuda else "torch"


def weight_order(layer: torch.nn.Module, prefix: str) -> str | None:
    """``kernel`` or ``checkpoint``; None for a layer that holds no such weight."""
    own = _own_parameters(layer)
    orders = {f"{prefix}_tiles": "kernel", f"{prefix}_packed": "checkpoint"}
    return next((order for name, order in orders.items() if name in own), None)


def _own_parameters(layer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters of the layer itself.

    vLLM's stand-in for a vision layer that a text-only server does not load hands out that layer's attributes, weights
    on no device among them.
    """
    return dict(layer.named_parameters(recurse=False))


def _is_due(device: torch.device) -> bool:
    return device.type == "cuda" or os.environ.get(KERNEL_LAYOUT_VARIABLE) == "1"


def _make_tables(device: torch.device) -> None:
    """Fill the caches of both codebook tables: while a graph is captured, nothing may be copied from the host."""
    codebook_table(device)
    no_weight = torch.zeros(1, 8, dtype=torch.uint8, device=device)
    dequantize(no_weight, torch.zeros(1, 1, dtype=torch.float16, device=device))
