"""NL4: the one truth of the format (numpy only). ``kernels/README.md`` states it in words, with golden vectors.

A weight row of K values is cut into groups of 16 along the input dimension. Each group holds sixteen 4-bit indices
into a fixed, non-linear, integer codebook ``c`` and one float16 scale ``s`` (of either sign):

    w[k] = s[k // 16] * c[index[k]] / 128

4 + 16/16 = 5.0 bits per weight. Dividing by 128 keeps ``s`` near the largest magnitude of its group, hence in
float16's normal range for any weight that a network really has. The product is exact in float32: 11 significant bits
times 8. The codebook is that of IQ4_NL (ggml, https://github.com/ggml-org/llama.cpp/pull/5590).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FORMAT_NAME = "nl4"
FORMAT_VERSION = 1
GROUP_SIZE = 16
SCALE_DIVISOR = 128
BITS_PER_WEIGHT = 5.0
CODEBOOK: tuple[int, ...] = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

ScaleSearch = Literal["mse", "absmax"]

Float32Array = NDArray[np.float32]
Uint8Array = NDArray[np.uint8]
Float16Array = NDArray[np.float16]

_CODEBOOK_F32 = np.asarray(CODEBOOK, dtype=np.float32)
_FLOAT16_MAX = float(np.finfo(np.float16).max)

# Starting points of the scale search, as multiples of a group's largest magnitude: around the scale that puts it on
# -127, and with both signs because the codebook is not symmetric. Finer grids gain under 0.02 dB.
SEARCH_STARTS: Float32Array = np.multiply.outer(
    np.asarray([1, -1], dtype=np.float32) * np.float32(SCALE_DIVISOR / 127),
    np.linspace(0.78, 1.22, 10, dtype=np.float32),
).reshape(-1)
SEARCH_FITS = 2  # least-squares fits from each start: the second, after indices moved, gains; a third does not
ABSMAX_START = np.float32(SCALE_DIVISOR / 127)
_GROUPS_PER_BLOCK = 1 << 14  # 1 MiB of float32: every temporary of the search stays in a core's cache


def _nearest_table() -> Uint8Array:
    """Index of the nearest codebook entry for every half-integer bin: ``table[floor(2 * y) + 256]``, y in [-128, 128).

    Decision thresholds lie midway between two integers, that is on multiples of one half, so a bin of width one half
    never straddles a threshold. A value exactly on a threshold takes the upper entry.
    """
    bin_centre = (np.arange(512, dtype=np.float64) - 256) / 2 + 0.25
    distance = np.abs(bin_centre[:, None] - np.asarray(CODEBOOK)[None, :])
    return np.asarray(distance.argmin(axis=1), dtype=np.uint8)


NEAREST: Uint8Array = _nearest_table()


def pack_indices(indices: Uint8Array) -> Uint8Array:
    """Pack 4-bit indices, two in a byte: even positions in the low nibble.

    Args:
        indices: uint8 ``[..., K]``, values 0..15, K even.

    Returns:
        uint8 ``[..., K // 2]``.

    Raises:
        ValueError: K is odd, or an index is over 15.
    """
    if indices.shape[-1] % 2:
        raise ValueError(f"pack_indices: the last dimension is {indices.shape[-1]}, it must be even")
    if indices.size and int(indices.max()) > 15:
        raise ValueError(f"pack_indices: an index is {int(indices.max())}, the codebook has 16 entries")
    return np.asarray(indices[..., 0::2] | (indices[..., 1::2] << 4), dtype=np.uint8)


def unpack_indices(packed: Uint8Array) -> Uint8Array:
    """Undo :func:`pack_indices`: uint8 ``[..., K // 2]`` to uint8 ``[..., K]``."""
    indices = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    indices[..., 0::2] = packed & 0x0F
    indices[..., 1::2] = packed >> 4
    return indices


def dequantize(packed: Uint8Array, scale: Float16Array) -> Float32Array:
    """Expand NL4 to float32, exactly.

    Args:
        packed: uint8 ``[..., K // 2]``.
        scale: float16 ``[..., K // 16]``.

    Returns:
        float32 ``[..., K]``; every value is exactly ``scale * codebook / 128``.

    Raises:
        ValueError: the two shapes do not belong together.
    """
    if packed.shape[:-1] != scale.shape[:-1] or packed.shape[-1] * 2 != scale.shape[-1] * GROUP_SIZE:
        raise ValueError(f"dequantize: packed {packed.shape} and scale {scale.shape} do not belong together")
    codes = _CODEBOOK_F32[unpack_indices(packed)]
    grouped = codes.reshape(*scale.shape, GROUP_SIZE)
    weight = grouped * (scale.astype(np.float32) / np.float32(SCALE_DIVISOR))[..., None]
    return weight.reshape(codes.shape)


def quantize(
    weight: Float32Array, importance: Float32Array | None = None, scale_search: ScaleSearch = "mse"
) -> tuple[Uint8Array, Float16Array]:
    """Quantize a weight to NL4.

    ``mse`` tries several scales of both signs for each group, refits each by least squares under the importance
    weights, and keeps the one with the smallest weighted squared error as it will be stored (float16 scale, nearest
    index). ``absmax`` is the plain method, the baseline to compare with: ``s = max|w| * 128 / 127``.

    Args:
        weight: float32 ``[..., K]``, finite.
        importance: float32 ``[K]`` or anything that broadcasts to ``weight``: the weight of each input channel in the
            squared error, for instance the mean of its squared activation. None means uniform, and so does a group
            of zeros; within a group a channel counts at least a ten-thousandth of the largest.
        scale_search: ``mse`` or ``absmax``.

    Returns:
        ``(packed uint8 [..., K // 2], scale float16 [..., K // 16])``. An all-zero group has scale +0 and index 8.

    Raises:
        ValueError: K is not a multiple of 16, a value is not finite, a group is too large for a float16 scale, or an
            importance is negative or not finite.
    """
    columns = weight.shape[-1] if weight.ndim else 0
    check_quantizable(columns, extremes(weight), None if importance is None else extremes(importance), scale_search)
    groups = np.ascontiguousarray(weight, dtype=np.float32).reshape(-1, GROUP_SIZE)
    channels = None if importance is None else np.broadcast_to(importance.astype(np.float32), weight.shape)
    scale = np.empty(groups.shape[0], dtype=np.float16)
    indices = np.empty(groups.shape, dtype=np.uint8)
    for start in range(0, groups.shape[0], _GROUPS_PER_BLOCK):
        stop = min(start + _GROUPS_PER_BLOCK, groups.shape[0])
        block = groups[start:stop]
        largest = np.abs(block).max(axis=1)
        if scale_search == "absmax":
            best = (largest * ABSMAX_START).astype(np.float16)
        else:
            picked = None if channels is None else relative_importance(_groups_of(channels, start, stop))
            best = _search_scale(block, largest, picked)
        scale[start:stop] = best
        indices[start:stop] = _nearest_indices(block, best)
    rows = weight.shape[:-1]
    return pack_indices(indices.reshape(*rows, columns)), scale.reshape(*rows, columns // GROUP_SIZE)


def check_quantizable(
    columns: int, weight: tuple[float, float], importance: tuple[float, float] | None, scale_search: str
) -> None:
    """Raise the ValueErrors of :func:`quantize`, for any implementation of it.

    Args:
        columns: K.
        weight: least and largest value, NaN if there is one.
        importance: the same, or None without importances.
        scale_search: the method's name.
    """
    if columns == 0 or columns % GROUP_SIZE:
        raise ValueError(f"the input dimension is {columns}, NL4 needs a multiple of {GROUP_SIZE}")
    if scale_search not in ("mse", "absmax"):
        raise ValueError(f"scale_search is {scale_search!r}, it must be 'mse' or 'absmax'")
    if importance is not None and not (importance[0] >= 0 and np.isfinite(importance[1])):
        raise ValueError("an importance is negative, NaN or infinite")
    if not (np.isfinite(weight[0]) and np.isfinite(weight[1])):
        raise ValueError("the weight holds NaN or infinity")
    largest = max(-weight[0], weight[1])
    if largest * SCALE_DIVISOR / 127 > _FLOAT16_MAX:
        raise ValueError(f"a weight of magnitude {largest:g} needs a scale beyond float16")


def extremes(array: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """Least and largest value of an array, for :func:`check_quantizable`; zeros if it is empty."""
    return (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)


def _groups_of(array: Float32Array, start: int, stop: int) -> Float32Array:
    """Groups start .. stop - 1 of an array ``[..., K]``, as ``[groups, 16]``, copying no more than those rows."""
    columns = array.shape[-1]
    groups_per_row = columns // GROUP_SIZE
    first_row, last_row = start // groups_per_row, -(-stop // groups_per_row)
    rows = np.arange(first_row, last_row)
    block = array[np.unravel_index(rows, array.shape[:-1])] if array.ndim > 1 else array[None]
    offset = start - first_row * groups_per_row
    return block.reshape(-1, GROUP_SIZE)[offset : offset + stop - start]


def relative_importance(importance: Float32Array) -> Float32Array:
    """Importances ``[groups, 16]`` relative to their group's largest; a channel counts at least a ten-thousandth of it.

    The floor keeps the search from erasing weights of channels that calibration happened not to see.
    """
    largest = importance.max(axis=1, keepdims=True)
    relative = np.divide(importance, largest, out=np.ones_like(importance), where=largest > 0)
    return np.asarray(np.maximum(relative, np.float32(1e-4)))


def _nearest_indices(groups: Float32Array, scale: Float16Array) -> Uint8Array:
    """Nearest codebook index of each value under its group's scale; index 8 (the entry nearest to 0) if it is 0."""
    return _lookup(groups * _inverse(scale)[:, None])


def _inverse(scale: Float16Array) -> Float32Array:
    """What turns a weight into codebook units: 128 / scale, or 0 if the scale is 0."""
    wide = scale.astype(np.float32)
    return np.divide(np.float32(SCALE_DIVISOR), wide, out=np.zeros_like(wide), where=wide != 0)


def _lookup(codes: Float32Array) -> Uint8Array:
    """Nearest codebook index of each value, given in codebook units."""
    bins = np.clip(codes, -128.0, 127.75) * np.float32(2) + np.float32(256)
    return NEAREST[bins.astype(np.int16)]  # the cast truncates, which is floor: bins are never negative


def _search_scale(groups: Float32Array, largest: Float32Array, importance: Float32Array | None) -> Float16Array:
    """Scale of each group with the smallest (weighted) squared error; see :func:`quantize`."""
    columns = np.ascontiguousarray(groups.T)
    weights = np.ones((GROUP_SIZE, 1), dtype=np.float32) if importance is None else np.ascontiguousarray(importance.T)
    weighted = columns * weights
    best_scale = np.zeros(groups.shape[0], dtype=np.float16)
    best_gain = np.zeros(groups.shape[0], dtype=np.float32)
    for start in SEARCH_STARTS:
        scale = largest * start
        for _ in range(SEARCH_FITS):
            stored, gain, refit = _score(columns, weighted, weights, scale)
            better = gain > best_gain
            best_gain[better] = gain[better]
            best_scale[better] = stored[better]
            scale = refit
    return best_scale


def _score(
    columns: Float32Array, weighted: Float32Array, weights: Float32Array, scale: Float32Array
) -> tuple[Float16Array, Float32Array, Float32Array]:
    """Rate one scale a group: (scale as stored, squared error saved by it, least-squares scale for its indices).

    With q the codebook values picked, the error is sum(i x^2) - gain, gain = 2 s sum(i x q) - s^2 sum(i q^2). Sums are
    formed column after column in float32, so that any implementation can come to the same bits.
    """
    stored = np.clip(scale, -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16)
    inverse = _inverse(stored)
    cross, square = np.zeros_like(scale), np.zeros_like(scale)
    for column, weighted_column, weight in zip(columns, weighted, weights, strict=True):
        codes = _CODEBOOK_F32[_lookup(column * inverse)]
        cross += weighted_column * codes
        square += codes * weight * codes
    unit = stored.astype(np.float32) / np.float32(SCALE_DIVISOR)
    gain = unit * (2 * cross - unit * square)
    refit = np.divide(cross, square, out=np.zeros_like(cross), where=square > 0) * np.float32(SCALE_DIVISOR)
    return stored, gain, refit
