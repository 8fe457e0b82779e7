"""Paged attention in plain Triton: prefill everywhere, and split-KV decode on GPUs that are not RDNA3 or RDNA4.

It cuts keys, splits and rows as :mod:`.decode_rdna` does and computes the same numbers, so it is that kernel's portable
twin too, for Triton's interpreter. With many query rows a work-group's waves share K and V through LDS, converted once
by all of them, and WMMA is the limit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from step128_kernels.attention.fp8 import (
    RDNA3_TO_HALVES,
    RDNA3_TO_HALVES_CONSTRAINTS,
    RDNA4_TO_PAIRS,
    RDNA4_TO_PAIRS_CONSTRAINTS,
    TO_HALVES,
    TO_HALVES_CONSTRAINTS,
    bytes_to_halves,
    pairs_to_floats,
)
from step128_kernels.attention.spans import split_span, tile_span
from step128_kernels.nl4_tiles import to_element

SHIFT = tl.constexpr(15.0)
_LEAST = tl.constexpr(-1.0e30)
_LOG2_E = tl.constexpr(1.4426950408889634)
_Q_EXPONENT = tl.constexpr(14)
_LEAST_EXPONENT = tl.constexpr(32)


@triton.jit
def _halves(word, TARGET: tl.constexpr):
    """float16 of the low and the high bytes of int16 words of two FP8 values."""
    if TARGET == "rdna4":
        pair = tl.inline_asm_elementwise(
            RDNA4_TO_PAIRS, RDNA4_TO_PAIRS_CONSTRAINTS, [word], dtype=tl.int64, is_pure=True, pack=2
        )
        low = pair.to(tl.int32).to(tl.float32, bitcast=True)
        high = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        low = tl.inline_asm_elementwise(TO_HALVES, TO_HALVES_CONSTRAINTS, [low], dtype=tl.float16, is_pure=True, pack=2)
        high = tl.inline_asm_elementwise(
            TO_HALVES, TO_HALVES_CONSTRAINTS, [high], dtype=tl.float16, is_pure=True, pack=2
        )
    elif TARGET == "rdna3":
        low, high = tl.inline_asm_elementwise(
            RDNA3_TO_HALVES,
            RDNA3_TO_HALVES_CONSTRAINTS,
            [word],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        low, high = bytes_to_halves(word)
    return low, high


@triton.jit
def _dot(a, b, total):
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _granule_offsets(table_ptr, keys, context, block_stride, PAGE: tl.constexpr, UNITS: tl.constexpr):
    """int64 offsets of the granules in which ``keys`` lie, in the cache's units of UNITS a key."""
    inside = tl.minimum(keys, context - 1)
    page = tl.load(table_ptr + inside // PAGE).to(tl.int64)
    return page * block_stride + inside % PAGE // 16 * (16 * UNITS)


@triton.jit
def _values(
    p0, p1, v_ptr, v_other_ptr, inside0, inside1, total, FP8: tl.constexpr, TARGET: tl.constexpr, MASKED: tl.constexpr
):
    """``p @ V`` of half of the dimensions, added to ``total``; as in :mod:`.decode_rdna`."""
    # What was never written may be NaN, and 0 * NaN is NaN: so keys that no row sees are zeros.
    if FP8:
        word = tl.load(v_ptr)
        if MASKED:
            word = word & (tl.where(inside0, 0x00FF, 0) | tl.where(inside1, 0xFF00, 0)).to(tl.int16)[:, None]
        v0, v1 = _halves(word, TARGET)
    else:
        v0, v1 = tl.load(v_ptr), tl.load(v_other_ptr)
        if MASKED:
            v0 = tl.where(inside0[:, None], v0, tl.zeros_like(v0))
            v1 = tl.where(inside1[:, None], v1, tl.zeros_like(v1))
    return _dot(p1, v1, _dot(p0, v0, total))


@triton.jit
def _tile(
    q0, q1, first_total, second_total, top, mass, factor, cache_ptr, table_ptr, key, position, context, lowest,
    block_stride,
    WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr,
    ELEMENT: tl.constexpr, TARGET: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_N keys, as in :mod:`.decode_rdna`: two halves of N keys each."""
    N: tl.constexpr = BLOCK_N // 2
    M: tl.constexpr = q0.shape[0]
    KEYS: tl.constexpr = 8 if FP8 else 16  # of a granule that lie in the same half of the tile
    UNITS: tl.constexpr = D if FP8 else 2 * D
    V_START: tl.constexpr = 8 * UNITS
    PROBABILITY: tl.constexpr = "fp16" if FP8 else ELEMENT
    HALF: tl.constexpr = KEYS * D // 2  # from the first to the second half of V's dimensions
    column = tl.arange(0, N)
    key0 = key + (column // 8 * 16 + column % 8 if FP8 else column)
    key1 = key0 + (8 if FP8 else N)
    from0 = _granule_offsets(table_ptr, key0, context, block_stride, PAGE, UNITS)
    from1 = from0 if FP8 else _granule_offsets(table_ptr, key1, context, block_stride, PAGE, UNITS)
    half_dim = tl.arange(0, D // 2)
    k_offsets = (half_dim // 8 * 128 + half_dim % 8)[:, None] + (column % KEYS * 8)[None, :]
    # Page tables hide from the compiler that offsets run on along the first dimension. Said here, where they are made:
    # of a function's argument it would not be heard.
    k0_offsets = from0[None, :] + k_offsets
    k0_ptr = cache_ptr + tl.max_contiguous(tl.multiple_of(k0_offsets, [8, 8]), [8, 1])
    zero = tl.zeros((M, N), tl.float32)
    if FP8:
        even, odd = _halves(tl.load(k0_ptr), TARGET)
        s0 = _dot(q1, odd, _dot(q0, even, zero))
        even, odd = _halves(tl.load(k0_ptr + 64), TARGET)
        s1 = _dot(q1, odd, _dot(q0, even, zero))
    else:
        k1_offsets = from1[None, :] + k_offsets
        k1_ptr = cache_ptr + tl.max_contiguous(tl.multiple_of(k1_offsets, [8, 8]), [8, 1])
        s0 = _dot(q1, tl.load(k0_ptr + 8 * D), _dot(q0, tl.load(k0_ptr), zero))
        s1 = _dot(q1, tl.load(k1_ptr + 8 * D), _dot(q0, tl.load(k1_ptr), zero))
    if MASKED:
        see0 = key0[None, :] <= position[:, None]
        see1 = key1[None, :] <= position[:, None]
        if WINDOW > 0:
            see0 = see0 & (key0[None, :] > position[:, None] - WINDOW)
            see1 = see1 & (key1[None, :] > position[:, None] - WINDOW)
        s0 = tl.where(see0, s0, float("-inf"))
        s1 = tl.where(see1, s1, float("-inf"))
    new_top = tl.maximum(top, tl.max(tl.maximum(s0, s1), 1) * factor)
    fade = tl.exp2(top - new_top)
    base = (new_top - SHIFT)[:, None]
    p0 = tl.exp2(s0 * factor[:, None] - base)
    p1 = tl.exp2(s1 * factor[:, None] - base)
    mass = mass * fade + tl.sum(p0 + p1, 1)
    first_total = first_total * fade[:, None]
    second_total = second_total * fade[:, None]
    p0, p1 = to_element(p0, PROBABILITY, TARGET != "portable"), to_element(p1, PROBABILITY, TARGET != "portable")
    v_offsets = (column % KEYS)[:, None] + (half_dim * KEYS)[None, :] + V_START
    v0_offsets = from0[:, None] + v_offsets
    v0_ptr = cache_ptr + tl.max_contiguous(tl.multiple_of(v0_offsets, [KEYS, KEYS]), [KEYS, 1])
    v1_offsets = from1[:, None] + v_offsets
    v1_ptr = cache_ptr + tl.max_contiguous(tl.multiple_of(v1_offsets, [KEYS, KEYS]), [KEYS, 1])
    inside0 = (key0 < context) & (key0 >= lowest)
    inside1 = (key1 < context) & (key1 >= lowest)
    first_total = _values(p0, p1, v0_ptr, v1_ptr, inside0, inside1, first_total, FP8, TARGET, MASKED)
    second_total = _values(p0, p1, v0_ptr + HALF, v1_ptr + HALF, inside0, inside1, second_total, FP8, TARGET, MASKED)
    return first_total, second_total, new_top, mass


@triton.jit(
    do_not_specialize=["splits", "least_tiles", "least_query_tokens", "most_query_tokens", "table_stride", "heads"],
)
def attention_paged_kernel(
    query_ptr,
    cache_ptr,
    table_ptr,
    lengths_ptr,
    starts_ptr,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    partial_ptr,
    mass_ptr,
    scale,
    query_stride,
    block_stride,
    head_stride,
    table_stride,
    heads,
    splits,
    least_tiles,
    least_query_tokens,
    most_query_tokens,
    GQA: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP8: tl.constexpr,
    ELEMENT: tl.constexpr,
    DIRECT: tl.constexpr,
    TARGET: tl.constexpr,
):
    """Attention of BLOCK_M query rows of one sequence and KV head over one part of the keys.

    Grid: row blocks, KV heads x splits, sequences. Only sequences with ``least_query_tokens`` to ``most_query_tokens``
    are computed. Other arguments as for :func:`.decode_rdna.attention_decode_kernel`.
    """
    head = tl.program_id(1) // splits
    split = tl.program_id(1) % splits
    sequence = tl.program_id(2)
    start = tl.load(starts_ptr + sequence)
    query_tokens = tl.load(starts_ptr + sequence + 1) - start
    context = tl.load(lengths_ptr + sequence)
    first_row = tl.program_id(0) * BLOCK_M
    if (first_row >= query_tokens * GQA) | (query_tokens > most_query_tokens) | (query_tokens < least_query_tokens):
        return
    first, full_first, full_last, last = tile_span(context, query_tokens, first_row, BLOCK_M, GQA, WINDOW, BLOCK_N)
    begin, end = split_span(first, last, split, splits, least_tiles)

    row = first_row + tl.arange(0, BLOCK_M)
    token = row // GQA
    query_head = head * GQA + row % GQA
    is_row = token < query_tokens
    slot = ((sequence * most_query_tokens + token) * heads + query_head) * splits + split
    if begin >= end:
        tl.store(mass_ptr + slot, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=is_row)
        return

    inside = tl.minimum(token, query_tokens - 1)
    half_dim = tl.arange(0, D // 2)
    WORDS: tl.constexpr = D // 2 if FP8 else D  # of a query head
    q_offsets = ((start + inside).to(tl.int64) * query_stride + query_head * WORDS)[:, None]
    if FP8:
        q0, q1 = pairs_to_floats(tl.load(query_ptr + (q_offsets + half_dim[None, :])), ELEMENT)
        largest = tl.max(tl.maximum(tl.abs(q0), tl.abs(q1)), 1)
        exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, _LEAST_EXPONENT)
        up = ((254 - exponent + _Q_EXPONENT) << 23).to(tl.float32, bitcast=True)[:, None]
        q0 = (q0 * up).to(tl.float16)
        q1 = (q1 * up).to(tl.float16)
        factor = ((exponent - _Q_EXPONENT) << 23).to(tl.float32, bitcast=True) * (
            scale * _LOG2_E * tl.load(k_scale_ptr)
        )
        v_scale = tl.load(v_scale_ptr)
    else:
        q0 = tl.load(query_ptr + (q_offsets + half_dim[None, :]))
        q1 = tl.load(query_ptr + (q_offsets + (D // 2 + half_dim)[None, :]))
        factor = tl.zeros((BLOCK_M,), tl.float32) + scale * _LOG2_E
        v_scale = 1.0

    table_ptr += sequence * table_stride
    cache_ptr += head.to(tl.int64) * head_stride
    position = context - query_tokens + inside
    lowest = first_row * 0
    if WINDOW > 0:
        lowest = context - query_tokens + first_row // GQA - WINDOW + 1
    top = tl.full((BLOCK_M,), _LEAST, tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    first_total = tl.zeros((BLOCK_M, D // 2), tl.float32)
    second_total = tl.zeros((BLOCK_M, D // 2), tl.float32)
    full_first = tl.minimum(tl.maximum(full_first, begin), end)
    full_last = tl.minimum(tl.maximum(full_last, full_first), end)
    for tile in range(full_first, full_last):
        first_total, second_total, top, mass = _tile(
            q0, q1, first_total, second_total, top, mass, factor, cache_ptr, table_ptr, tile * BLOCK_N, position,
            context, lowest, block_stride, WINDOW, BLOCK_N, D, PAGE, FP8, ELEMENT, TARGET, False,
        )  # fmt: skip
    # Then the tiles that some row must mask: before the full ones (a window's start) and after them.
    for number in range(begin, end - (full_last - full_first)):
        key = tl.where(number < full_first, number, number + full_last - full_first) * BLOCK_N
        first_total, second_total, top, mass = _tile(
            q0, q1, first_total, second_total, top, mass, factor, cache_ptr, table_ptr, key, position,
            context, lowest, block_stride, WINDOW, BLOCK_N, D, PAGE, FP8, ELEMENT, TARGET, True,
        )  # fmt: skip

    share = tl.where(mass > 0, v_scale / mass, 0.0)[:, None]
    mask = is_row[:, None] & (half_dim >= 0)[None, :]
    if DIRECT:
        offsets = (((start + token).to(tl.int64) * heads + query_head) * D)[:, None] + half_dim[None, :]
        amd: tl.constexpr = TARGET != "portable"
        tl.store(out_ptr + offsets, to_element(first_total * share, ELEMENT, amd), mask=mask)
        tl.store(out_ptr + (offsets + D // 2), to_element(second_total * share, ELEMENT, amd), mask=mask)
    else:
        offsets = (slot * D)[:, None] + half_dim[None, :]
        tl.store(partial_ptr + offsets, first_total * share, mask=mask)
        tl.store(partial_ptr + (offsets + D // 2), second_total * share, mask=mask)
        tl.store(mass_ptr + slot, tl.where(mass > 0, top + tl.log2(mass) - SHIFT, float("-inf")), mask=is_row)
