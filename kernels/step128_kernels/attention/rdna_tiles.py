"""What the one-wave and the many-wave kernel for RDNA3 and RDNA4 share, in Gluon: conversion, WMMA, queries, pages."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from step128_kernels import nl4_tiles
from step128_kernels.attention import fp8, spans
from step128_kernels.attention.fp8 import (
    RDNA3_TO_HALVES,
    RDNA3_TO_HALVES_CONSTRAINTS,
    RDNA4_TO_PAIRS,
    RDNA4_TO_PAIRS_CONSTRAINTS,
    TO_HALVES,
    TO_HALVES_CONSTRAINTS,
)

tile_span = gluon.jit(spans.tile_span.fn)
split_span = gluon.jit(spans.split_span.fn)
to_element = gluon.jit(nl4_tiles.to_element.fn)
pairs_to_floats = gluon.jit(fp8.pairs_to_floats.fn)

SHIFT = gl.constexpr(15.0)
"""Probabilities are at most 2**15: float16's smallest normal number is then 2**-29 of the largest probability."""
CHUNK = gl.constexpr(16)
"""Dimensions of K taken at a time: LLVM would convert or load all of them first, and spill."""
LEAST = gl.constexpr(-1.0e30)
LOG2_E = gl.constexpr(1.4426950408889634)
_Q_EXPONENT = gl.constexpr(14)
_LEAST_EXPONENT = gl.constexpr(32)


@gluon.jit
def halves(word, RDNA4: gl.constexpr):
    """float16 of the low and the high bytes of int16 words of two FP8 values."""
    if RDNA4:
        pair = gl.inline_asm_elementwise(
            RDNA4_TO_PAIRS, RDNA4_TO_PAIRS_CONSTRAINTS, [word], dtype=gl.int64, is_pure=True, pack=2
        )
        low = pair.to(gl.int32).to(gl.float32, bitcast=True)
        high = (pair >> 32).to(gl.int32).to(gl.float32, bitcast=True)
        low = gl.inline_asm_elementwise(TO_HALVES, TO_HALVES_CONSTRAINTS, [low], dtype=gl.float16, is_pure=True, pack=2)
        high = gl.inline_asm_elementwise(
            TO_HALVES, TO_HALVES_CONSTRAINTS, [high], dtype=gl.float16, is_pure=True, pack=2
        )
    else:
        low, high = gl.inline_asm_elementwise(
            RDNA3_TO_HALVES,
            RDNA3_TO_HALVES_CONSTRAINTS,
            [word],
            dtype=(gl.float16, gl.float16),
            is_pure=True,
            pack=2,
        )
    return low, high


@gluon.jit
def wmma(a, b, total, RDNA4: gl.constexpr):
    """``a @ b + total``."""
    if RDNA4:
        total = gl.amd.rdna4.wmma(a, b, total)
    else:
        total = gl.amd.rdna3.wmma(a, b, total)
    return total


@gluon.jit
def load_queries(
    query_ptr,
    offsets,
    scale,
    k_scale_ptr,
    D: gl.constexpr,
    FP8: gl.constexpr,
    ELEMENT: gl.constexpr,
    left: gl.constexpr,
):
    """Query rows in two halves ``[rows, D / 2]``, and what scores must be multiplied with for exp2, ``[rows]``.

    With FP8 the halves are even and odd dimensions, read as int32 of two, scaled by a power of two a row to at most
    2**15, as float16; else the first and the second half as they are. ``offsets`` ``[rows]``: in elements of
    ``query_ptr``.
    """
    dim = gl.arange(0, D // 2, layout=gl.SliceLayout(0, left))
    if FP8:
        q0, q1 = pairs_to_floats(gl.load(query_ptr + (offsets[:, None] + dim[None, :])), ELEMENT)
        largest = gl.max(gl.maximum(gl.abs(q0), gl.abs(q1)), 1)
        exponent = gl.maximum(largest.to(gl.int32, bitcast=True) >> 23, _LEAST_EXPONENT)
        up = ((254 - exponent + _Q_EXPONENT) << 23).to(gl.float32, bitcast=True)[:, None]
        q0 = (q0 * up).to(gl.float16)
        q1 = (q1 * up).to(gl.float16)
        down = ((exponent - _Q_EXPONENT) << 23).to(gl.float32, bitcast=True)
        factor = down * (scale * LOG2_E * gl.load(k_scale_ptr))
    else:
        q0 = gl.load(query_ptr + (offsets[:, None] + dim[None, :]))
        q1 = gl.load(query_ptr + (offsets[:, None] + (D // 2 + dim)[None, :]))
        factor = (offsets * 0).to(gl.float32) + scale * LOG2_E
    return q0, q1, factor


@gluon.jit
def page_offset(table_ptr, key, context, block_stride, PAGE: gl.constexpr, UNITS: gl.constexpr):
    """int64 offset of the granule of ``key`` from the cache's first, in the cache's units of UNITS a key."""
    inside = gl.minimum(key, context - 1)
    return gl.load(table_ptr + inside // PAGE).to(gl.int64) * block_stride + (inside % PAGE // 16) * (16 * UNITS)
