"""The compiled part of :mod:`step128_checkpoint.quantization.gptq`; importing it needs numba.

A tile of LANES rows is held transposed, one row a lane, and goes through all columns. Corrections within a block of
BLOCK columns are made at once; those of later columns when the block is done (GPTQ's lazy update), so that the tile is
walked K / BLOCK times instead of K times. Either way a weight loses the corrections one by one, in the order of the
columns that they come from, each rounded once (a fused multiply-add, twice as fast as two roundings and the same on
every machine), so blocks and tiles change no bit.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types  # type: ignore[import-untyped]
from numba.extending import intrinsic  # type: ignore[import-untyped]
from numpy.typing import NDArray

from step128_checkpoint.quantization.search_compiled import (
    CODES,
    LANES,
    SCALE,
    WEIGHT,
    WORK,
    bin_of,
    compiled,
    float16_bits,
    search_lanes,
)
from step128_kernels.codebook import GROUP_SIZE, NEAREST, SCALE_DIVISOR, Float32Array, Uint8Array

_BLOCK = 128  # the errors of a block, 32 KiB, stay in the first cache
_PANEL = 16  # columns of the factor that are transposed at a time: one line of the cache in each row
_DIVISOR, _ZERO = np.float32(SCALE_DIVISOR), np.float32(0)


@intrinsic
def _minus_product(typing_context: Any, value: Any, factor: Any, error: Any) -> Any:
    """``value - factor * error`` in float32, rounded once (IEEE 754's fused multiply-add)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, factor, error = arguments
        return builder.fma(builder.fneg(factor), error, value)

    return types.float32(types.float32, types.float32, types.float32), generate


@compiled
def _spread(tile: Float32Array, errors: Float32Array, panel: Float32Array) -> None:
    """Subtract a block's errors from a panel's columns: ``tile[c] -= sum_k panel[c, k] errors[k]``, k ascending."""
    for column in range(_PANEL):
        place = column * LANES
        for k in range(0, _BLOCK, 8):
            at = column * _BLOCK + k
            p0, p1, p2, p3 = panel[at], panel[at + 1], panel[at + 2], panel[at + 3]
            p4, p5, p6, p7 = panel[at + 4], panel[at + 5], panel[at + 6], panel[at + 7]
            for lane in range(LANES):
                value = tile[place + lane]
                value = _minus_product(value, p0, errors[k * LANES + lane])
                value = _minus_product(value, p1, errors[(k + 1) * LANES + lane])
                value = _minus_product(value, p2, errors[(k + 2) * LANES + lane])
                value = _minus_product(value, p3, errors[(k + 3) * LANES + lane])
                value = _minus_product(value, p4, errors[(k + 4) * LANES + lane])
                value = _minus_product(value, p5, errors[(k + 5) * LANES + lane])
                value = _minus_product(value, p6, errors[(k + 6) * LANES + lane])
                value = _minus_product(value, p7, errors[(k + 7) * LANES + lane])
                tile[place + lane] = value


@compiled
def _panels(factor: Float32Array) -> Float32Array:
    """The factor right of its blocks on the diagonal, ``[panels, PANEL * BLOCK]`` in the order of their use.

    Panel [c, k] is the transpose of BLOCK rows and PANEL columns. All, half as large as the factor, are read one
    after the other for every tile, while the rows of the factor lie far apart.
    """
    columns = factor.shape[0]
    count = 0
    for stop in range(_BLOCK, columns, _BLOCK):
        count += (columns - stop) // _PANEL
    panels = np.empty((count, _PANEL * _BLOCK), np.float32)
    panel = 0
    for stop in range(_BLOCK, columns, _BLOCK):
        for begin in range(stop, columns, _PANEL):
            for k in range(_BLOCK):
                for number in range(_PANEL):
                    panels[panel, number * _BLOCK + k] = factor[stop - _BLOCK + k, begin + number]
            panel += 1
    return panels


@compiled
def _correct(tile: Float32Array, error: Float32Array, factor_row: Float32Array) -> None:
    """Subtract one column's error from the columns that ``tile`` begins with."""
    for column in range(factor_row.shape[0]):
        share = factor_row[column]
        for lane in range(LANES):
            place = column * LANES + lane
            tile[place] = _minus_product(tile[place], share, error[lane])


@compiled
def _quantize_column(
    column: Float32Array, scale: Float32Array, error: Float32Array, indices: Uint8Array, diagonal: np.float32
) -> None:
    """Nearest codes of one column, and what each lane must make up for in later columns."""
    for lane in range(LANES):
        stored = scale[lane]
        inverse = _DIVISOR / stored if stored != _ZERO else _ZERO
        number = np.uint32(bin_of(column[lane], inverse))
        indices[lane] = NEAREST[number]
        error[lane] = (column[lane] - CODES[number] * (stored / _DIVISOR)) / diagonal


@compiled
def quantize(
    weight: Float32Array, factor: Float32Array, importance: Float32Array, packed: Uint8Array, scale: NDArray[np.uint16]
) -> None:
    """Quantize with error feedback.

    Args:
        weight: float32 ``[rows, K]``, finite.
        factor: float32 ``[K, K]``, upper triangular.
        importance: float32 ``[K / 16, 16]``, relative to each group's largest.
        packed: uint8 ``[rows, K / 2]``, written.
        scale: the bits of float16 ``[rows, K / 16]``, written.
    """
    rows, columns = weight.shape
    tile = np.empty(columns * LANES, np.float32)
    errors = np.zeros(_BLOCK * LANES, np.float32)
    panels = _panels(factor)
    work = np.empty(WORK, np.float32)
    bins, codes = np.empty(LANES, np.int32), CODES.copy()
    indices = np.empty((2, LANES), np.uint8)
    for first in range(0, rows, LANES):
        used = min(LANES, rows - first)
        tile[:] = _ZERO
        for lane in range(used):
            for column in range(columns):
                tile[column * LANES + lane] = weight[first + lane, column]
        panel = 0
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            for column in range(start, stop):
                place = column * LANES
                if column % GROUP_SIZE == 0:
                    group = column // GROUP_SIZE
                    work[: GROUP_SIZE * LANES] = tile[place : place + GROUP_SIZE * LANES]
                    for number in range(GROUP_SIZE):
                        begin = WEIGHT + number * LANES
                        work[begin : begin + LANES] = importance[group, number]
                    search_lanes(work, bins, codes)
                    for lane in range(used):
                        scale[first + lane, group] = float16_bits(work[SCALE + lane])
                error = errors[(column - start) * LANES : (column - start + 1) * LANES]
                _quantize_column(
                    tile[place : place + LANES],
                    work[SCALE : SCALE + LANES],
                    error,
                    indices[column % 2],
                    factor[column, column],
                )
                if column % 2:
                    for lane in range(used):
                        packed[first + lane, column // 2] = indices[0, lane] | (indices[1, lane] << 4)
                _correct(tile[place + LANES : stop * LANES], error, factor[column, column + 1 : stop])
            for begin in range(stop, columns, _PANEL):  # only after a full block: none is left after a shorter one
                _spread(tile[begin * LANES : (begin + _PANEL) * LANES], errors, panels[panel])
                panel += 1
