"""NL4 routed experts. Callers use what stands here; triton is imported only where a GPU computes.

``nl4_moe`` takes weights as a checkpoint stores them, and is the torch reference. ``nl4_moe_tiled`` takes them in the
kernels' order and picks by device: Triton on a GPU, the reference on a CPU.
"""

from __future__ import annotations

import torch

from step128_kernels.nl4_layout import from_kernel_layout
from step128_kernels.nl4_moe.reference import nl4_moe_reference as nl4_moe
from step128_kernels.nl4_moe.reference import routed_experts
from step128_kernels.torch_codebook import dequantize

__all__ = ["nl4_moe", "nl4_moe_tiled"]


def nl4_moe_tiled(
    x: torch.Tensor,
    gate_up_tiles: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_tiles: torch.Tensor,
    down_scales: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    intermediate: int,
    swiglu_limit: float | None,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs, weights in kernel layout (:mod:`step128_kernels.nl4_layout`).

    Args:
        x: float ``[tokens, hidden]``.
        gate_up_tiles: int64 ``[experts, 2 * I / 16, hidden / 32, 16, 2]``, gate rows first.
        gate_up_scales: int32 ``[experts, 2 * I / 16, hidden / 32, 16]``.
        down_tiles: int64 ``[experts, hidden / 16, I / 32, 16, 2]``.
        down_scales: int32 ``[experts, hidden / 16, I / 32, 16]``.
        topk_weights: float ``[tokens, top_k]``.
        topk_ids: int ``[tokens, top_k]``, global expert numbers.
        intermediate: I, a multiple of 16.
        swiglu_limit: clamp of this layer, or None.
        expert_map: int ``[global experts]``: local number of each, -1 where another rank holds it; None when this
            rank holds them all.

    Returns:
        ``[tokens, hidden]`` in the dtype of ``x``.
    """
    if x.is_cuda:
        from step128_kernels.nl4_moe.triton_moe import nl4_moe_triton

        gate_up, down = (gate_up_tiles, gate_up_scales), (down_tiles, down_scales)
        return nl4_moe_triton(x, *gate_up, *down, topk_weights, topk_ids, intermediate, swiglu_limit, expert_map)
    hidden = x.shape[-1]

    def gate_up_weight(expert: int) -> torch.Tensor:
        stored = from_kernel_layout(gate_up_tiles[expert], gate_up_scales[expert], 2 * intermediate, hidden)
        return dequantize(*stored, x.dtype)

    def down_weight(expert: int) -> torch.Tensor:
        stored = from_kernel_layout(down_tiles[expert], down_scales[expert], hidden, intermediate)
        return dequantize(*stored, x.dtype)

    return routed_experts(x, gate_up_weight, down_weight, topk_weights, topk_ids, swiglu_limit, expert_map)
