"""What quantization costs: squared weights and squared errors of a tensor, plain and weighted by importance.

Sums add up over pieces, matrices and tensors. The weighted error is that of the linear layer's output if its input
channels are uncorrelated: E[(sum_k e_k x_k)^2] = sum_k e_k^2 E[x_k^2] then, and the importance is E[x_k^2].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from step128_kernels.codebook import CODEBOOK, GROUP_SIZE, SCALE_DIVISOR, Float16Array, Float32Array, Uint8Array

_WEIGHTS_PER_BLOCK = 1 << 16  # 256 KiB of float32: the temporaries stay in a core's cache
_PAIRS = np.asarray([(CODEBOOK[byte & 15], CODEBOOK[byte >> 4]) for byte in range(256)], dtype=np.float32)


@dataclass(frozen=True)
class ErrorSums:
    """Sums over weights w with restored values v and importances i: w^2, (w - v)^2, i w^2 and i (w - v)^2."""

    signal: float
    error: float
    weighted_signal: float
    weighted_error: float

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums(
            self.signal + other.signal,
            self.error + other.error,
            self.weighted_signal + other.weighted_signal,
            self.weighted_error + other.weighted_error,
        )

    @property
    def sqnr_db(self) -> float:
        """Signal over quantization noise in dB: infinite without noise, NaN without signal."""
        return _decibel(self.signal, self.error)

    @property
    def weighted_sqnr_db(self) -> float:
        """The same for the weighted sums."""
        return _decibel(self.weighted_signal, self.weighted_error)


def error_sums(
    weight: Float32Array, packed: Uint8Array, scale: Float16Array, importance: Float32Array | None = None
) -> ErrorSums:
    """Compare a matrix with its quantized form; the same input gives the same bits.

    Args:
        weight: float32 ``[rows, K]``.
        packed: uint8 ``[rows, K // 2]``.
        scale: float16 ``[rows, K // 16]``.
        importance: float32 ``[K]``; None means ones.

    Returns:
        The sums, formed in float64 from float32 sums of a few rows each.
    """
    rows, columns = weight.shape
    signal, error = np.zeros(columns), np.zeros(columns)
    step = max(1, min(64, _WEIGHTS_PER_BLOCK // columns))
    for first in range(0, rows, step):
        block = weight[first : first + step]
        unit = scale[first : first + step].astype(np.float32) / np.float32(SCALE_DIVISOR)
        codes = _PAIRS[packed[first : first + step]].reshape(*unit.shape, GROUP_SIZE)
        codes *= unit[..., None]
        difference = codes.reshape(block.shape)
        difference -= block
        signal += np.einsum("rk,rk->k", block, block)
        error += np.einsum("rk,rk->k", difference, difference)
    weights = np.ones(columns) if importance is None else importance.astype(np.float64)
    return ErrorSums(
        float(signal.sum()), float(error.sum()), float((signal * weights).sum()), float((error * weights).sum())
    )


def _decibel(signal: float, noise: float) -> float:
    if signal == 0:
        return math.nan
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf
