"""NL4 in torch: the same arithmetic as :mod:`step128_kernels.codebook`, for whatever device the tensors are on."""

from __future__ import annotations

from functools import lru_cache

import torch

from step128_kernels.codebook import CODEBOOK, GROUP_SIZE, SCALE_DIVISOR


@lru_cache(maxsize=8)
def _byte_table(device: torch.device) -> torch.Tensor:
    """float32 ``[256, 2]``: both codebook values that a packed byte stands for (low nibble first)."""
    codes = torch.tensor(CODEBOOK, dtype=torch.float32)
    byte = torch.arange(256)
    return torch.stack((codes[byte & 15], codes[byte >> 4]), dim=-1).to(device)


def dequantize(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Expand NL4 weights.

    Args:
        packed: uint8 ``[..., K // 2]``.
        scale: float16 ``[..., K // 16]``.
        dtype: of the result; the product is formed in float32 (where it is exact) and rounded once.

    Returns:
        ``dtype`` ``[..., K]``.
    """
    codes = _byte_table(packed.device)[packed.int()].view(*scale.shape, GROUP_SIZE)
    weight = codes * (scale.float() / SCALE_DIVISOR).unsqueeze(-1)
    return weight.flatten(-2).to(dtype)
