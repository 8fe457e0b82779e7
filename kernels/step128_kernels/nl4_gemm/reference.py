"""NL4 linear layer in clear torch: the definition that every kernel is tested against, and the path used on a CPU."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from step128_kernels.torch_codebook import dequantize

# Rows dequantized at a time: the language-model head (128896 rows of 4096) would otherwise need 2 GB at once.
_ROWS_PER_BLOCK = 16384


def nl4_gemm_reference(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply activations by an NL4 weight: ``x @ dequantize(packed, scale).T``.

    Args:
        x: float ``[..., K]``.
        packed: uint8 ``[N, K // 2]``.
        scale: float16 ``[N, K // 16]``.

    Returns:
        ``[..., N]`` in the dtype of ``x``. Weights are rounded to the dtype of ``x`` before the product, as a
        checkpoint stored in that dtype would be.
    """
    blocks = [
        linear(x, dequantize(packed[row : row + _ROWS_PER_BLOCK], scale[row : row + _ROWS_PER_BLOCK], x.dtype))
        for row in range(0, packed.shape[0], _ROWS_PER_BLOCK)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
