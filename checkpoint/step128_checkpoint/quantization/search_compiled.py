"""The compiled part of :mod:`step128_checkpoint.quantization.search`; importing it needs numba.

Groups are handled in blocks of LANES, one group a lane: the block is transposed, inner loops run over lanes, and each
lane sums its 16 columns in order, as the reference does. Every product and sum is rounded on its own (no fastmath), so
the bits do not depend on the machine.

Looking codes up is a loop of its own, from a table that is an argument, no constant: LLVM then leaves that loop scalar
and vectorises those around it. One loop for all is scalar all over, and gathers from a constant table are slower than
single loads (a third and two thirds of the speed; measured on an Intel Xeon with AVX-512).
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit  # type: ignore[import-untyped]
from numpy.typing import NDArray

from step128_kernels.codebook import (
    ABSMAX_START,
    CODEBOOK,
    GROUP_SIZE,
    NEAREST,
    SCALE_DIVISOR,
    SEARCH_FITS,
    SEARCH_STARTS,
    Float32Array,
    Uint8Array,
)

LANES = 64  # the block's 16 columns, weighted and not, and their weights are 12 KiB: they stay in the first cache

# Places in a block's one work array: were these arrays of their own, LLVM could not tell that they do not overlap. The
# sixteen columns come first, then the same columns times their weights, the weights, and single rows.
_WEIGHTED, WEIGHT = GROUP_SIZE * LANES, 2 * GROUP_SIZE * LANES
SCALE, _INVERSE, _CODE, _CROSS, _SQUARE, _BEST_GAIN, _BEST_SCALE, _LARGEST, WORK = (
    (3 * GROUP_SIZE + row) * LANES for row in range(9)
)

CODES = np.asarray(CODEBOOK, dtype=np.float32)[NEAREST]
_ZERO, _HALF, _TWO, _BIN = np.float32(0), np.float32(0.5), np.float32(2), np.float32(256)
_LOWEST, _HIGHEST = np.float32(-128), np.float32(127.75)
_FLOAT16_MAX, _FLOAT16_NORMAL = np.float32(65504), np.float32(2**-14)
_DIVISOR = np.float32(SCALE_DIVISOR)
_ROUND, _DROPPED, _ONE = np.int32(0x0FFF), np.int32(13), np.int32(1)  # float32 has 13 bits more of mantissa
_KEPT = np.int32(~0x1FFF)

compiled: Any = njit(nogil=True, cache=True, error_model="numpy")


@compiled
def round_to_float16(values: Float32Array, scratch: NDArray[np.int32]) -> None:
    """Round to the nearest float16, ties to even, in place; magnitudes at most 65504 (the caller clips).

    ``scratch`` is as long as ``values``. Two loops, neither of which reads and writes the same memory in two types, so
    that both become vector code.
    """
    bits, rounded = values.view(np.int32), scratch.view(np.float32)
    for lane in range(values.shape[0]):
        scratch[lane] = (bits[lane] + _ROUND + ((bits[lane] >> _DROPPED) & _ONE)) & _KEPT
    for lane in range(values.shape[0]):
        value = values[lane]
        size = abs(value)  # float16's subnormals are multiples of 2^-24, float32's last bit from 1/2 to 1
        small = (size + _HALF) - _HALF
        small = -small if value < _ZERO else small
        values[lane] = small if size < _FLOAT16_NORMAL else rounded[lane]


@compiled
def float16_bits(value: np.float32) -> np.uint16:
    """The bits of a float16 that is held in a float32, a positive zero for either zero."""
    size = abs(value)
    sign = 0x8000 if value < _ZERO else 0
    if size < _FLOAT16_NORMAL:
        return np.uint16(sign + int(size * np.float32(2**24)))
    exponent = 0
    while size >= _TWO:
        size *= _HALF
        exponent += 1
    while size < np.float32(1):
        size *= _TWO
        exponent -= 1
    return np.uint16(sign + ((exponent + 15) << 10) + int((size - np.float32(1)) * np.float32(1024)))


@compiled
def bin_of(weight: np.float32, inverse: np.float32) -> np.int32:
    """The bin of NEAREST in which a weight lies under the inverse of its scale."""
    code = weight * inverse
    code = code if code > _LOWEST else _LOWEST
    code = code if code < _HIGHEST else _HIGHEST
    return np.int32(code * _TWO + _BIN)


@compiled
def _score(work: Float32Array, bins: NDArray[np.int32], codes: Float32Array) -> None:
    """Rate the scale of every lane, keep it where it is the best so far, and put the least-squares one in its place."""
    for lane in range(SCALE, SCALE + LANES):
        value = work[lane]
        value = value if value < _FLOAT16_MAX else _FLOAT16_MAX
        work[lane] = value if value > -_FLOAT16_MAX else -_FLOAT16_MAX
    round_to_float16(work[SCALE : SCALE + LANES], bins)
    for lane in range(LANES):
        work[_INVERSE + lane] = _DIVISOR / work[SCALE + lane] if work[SCALE + lane] != _ZERO else _ZERO
        work[_CROSS + lane] = _ZERO
        work[_SQUARE + lane] = _ZERO
    for number in range(GROUP_SIZE):
        column = number * LANES
        for lane in range(LANES):
            bins[lane] = bin_of(work[column + lane], work[_INVERSE + lane])
        for lane in range(LANES):
            work[_CODE + lane] = codes[np.uint32(bins[lane])]
        for lane in range(LANES):
            code = work[_CODE + lane]
            work[_CROSS + lane] += work[_WEIGHTED + column + lane] * code
            work[_SQUARE + lane] += code * work[WEIGHT + column + lane] * code
    for lane in range(LANES):
        scale, cross, square = work[SCALE + lane], work[_CROSS + lane], work[_SQUARE + lane]
        unit = scale / _DIVISOR
        gain = unit * (_TWO * cross - unit * square)
        better = gain > work[_BEST_GAIN + lane]
        work[_BEST_GAIN + lane] = gain if better else work[_BEST_GAIN + lane]
        work[_BEST_SCALE + lane] = scale if better else work[_BEST_SCALE + lane]
        work[SCALE + lane] = (cross / square if square > _ZERO else _ZERO) * _DIVISOR


@compiled
def _load(groups: Float32Array, work: Float32Array) -> None:
    """Transpose up to LANES groups into the columns; lanes without a group become zeros."""
    work[: GROUP_SIZE * LANES] = _ZERO
    for lane in range(groups.shape[0]):
        for number in range(GROUP_SIZE):
            work[number * LANES + lane] = groups[lane, number]


@compiled
def _find_largest(work: Float32Array) -> None:
    work[_LARGEST : _LARGEST + LANES] = _ZERO
    for place in range(0, GROUP_SIZE * LANES, LANES):
        for lane in range(LANES):
            work[_LARGEST + lane] = max(work[_LARGEST + lane], abs(work[place + lane]))


@compiled
def search_lanes(work: Float32Array, bins: NDArray[np.int32], codes: Float32Array) -> None:
    """Put the best scale of every lane in its place, for the columns and weights that lie in theirs.

    Args:
        work: float32 ``[WORK]``: columns first, their weights from WEIGHT on; the scales come to SCALE.
        bins: int32 ``[LANES]``, scratch.
        codes: a copy of CODES.
    """
    _find_largest(work)
    for place in range(GROUP_SIZE * LANES):
        work[_WEIGHTED + place] = work[place] * work[WEIGHT + place]
    work[_BEST_GAIN : _BEST_GAIN + LANES] = _ZERO
    work[_BEST_SCALE : _BEST_SCALE + LANES] = _ZERO
    for start in SEARCH_STARTS:
        for lane in range(LANES):
            work[SCALE + lane] = work[_LARGEST + lane] * start
        for _ in range(SEARCH_FITS):
            _score(work, bins, codes)
    work[SCALE : SCALE + LANES] = work[_BEST_SCALE : _BEST_SCALE + LANES]


@compiled
def _store(work: Float32Array, packed: Uint8Array, scale: NDArray[np.uint16]) -> None:
    """Write the scale of each lane and the indices that are nearest under it."""
    for lane in range(scale.shape[0]):
        stored = work[SCALE + lane]
        scale[lane] = float16_bits(stored)
        inverse = _DIVISOR / stored if stored != _ZERO else _ZERO
        for byte in range(GROUP_SIZE // 2):
            low = NEAREST[np.uint32(bin_of(work[2 * byte * LANES + lane], inverse))]
            high = NEAREST[np.uint32(bin_of(work[(2 * byte + 1) * LANES + lane], inverse))]
            packed[lane, byte] = low | (high << 4)


@compiled
def search(groups: Float32Array, importance: Float32Array, packed: Uint8Array, scale: NDArray[np.uint16]) -> None:
    """Method ``mse``.

    Args:
        groups: float32 ``[G, 16]``, finite.
        importance: float32 ``[P, 16]``, relative to each group's largest; group g takes row g modulo P.
        packed: uint8 ``[G, 8]``, written.
        scale: the bits of float16 ``[G]``, written.
    """
    work = np.empty(WORK, np.float32)
    bins, codes = np.empty(LANES, np.int32), CODES.copy()
    for first in range(0, groups.shape[0], LANES):
        last = min(first + LANES, groups.shape[0])
        _load(groups[first:last], work)
        for lane in range(LANES):
            row = (first + lane) % importance.shape[0]
            for number in range(GROUP_SIZE):
                work[WEIGHT + number * LANES + lane] = importance[row, number]
        search_lanes(work, bins, codes)
        _store(work, packed[first:last], scale[first:last])


@compiled
def absmax(groups: Float32Array, packed: Uint8Array, scale: NDArray[np.uint16]) -> None:
    """Method ``absmax``; arguments as those of :func:`search`."""
    work = np.empty(WORK, np.float32)
    bins = np.empty(LANES, np.int32)
    for first in range(0, groups.shape[0], LANES):
        last = min(first + LANES, groups.shape[0])
        _load(groups[first:last], work)
        _find_largest(work)
        for lane in range(LANES):
            work[SCALE + lane] = work[_LARGEST + lane] * ABSMAX_START
        round_to_float16(work[SCALE : SCALE + LANES], bins)
        _store(work, packed[first:last], scale[first:last])
