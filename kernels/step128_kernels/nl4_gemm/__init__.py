"""NL4 linear layer. Callers use what stands here; triton is imported only where a GPU computes.

``nl4_gemm`` takes weights as a checkpoint stores them, and is the torch reference. ``nl4_gemm_tiled`` takes them in the
kernels' order and picks by device: Triton on a GPU, the reference on a CPU.
"""

from __future__ import annotations

import torch

from step128_kernels.nl4_gemm.reference import nl4_gemm_reference as nl4_gemm
from step128_kernels.nl4_layout import from_kernel_layout

__all__ = ["nl4_gemm", "nl4_gemm_tiled"]


def nl4_gemm_tiled(x: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor, rows: int) -> torch.Tensor:
    """Multiply activations by an NL4 weight in kernel layout.

    Args:
        x: float ``[..., K]``.
        tiles: int64 ``[N / 16, K / 32, 16, 2]`` (:mod:`step128_kernels.nl4_layout`).
        scales: int32 ``[N / 16, K / 32, 16]``.
        rows: N before padding.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    if x.is_cuda:
        from step128_kernels.nl4_gemm.triton_gemm import nl4_gemm_triton

        return nl4_gemm_triton(x, tiles, scales, rows)
    return nl4_gemm(x, *from_kernel_layout(tiles, scales, rows, x.shape[-1]))
