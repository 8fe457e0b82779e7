"""Split-KV attention for 1 to 8 query tokens on RDNA3 and RDNA4, in Gluon: one wave, 16 query rows, no LDS.

A wave owns 16 query rows (tokens x heads that share a KV head) and a part of the keys. Everything stays in the layouts
of WMMA: pages are ordered so that a lane's 128-bit load is its operand (:mod:`.page_order`), the transposed
accumulator of the scores is the operand of the second product, and FP8 is converted in registers (:mod:`.fp8`).

Arithmetic, FP8 cache: queries are scaled by a power of two a row and rounded to float16 (three bits more than
bfloat16), K and V become float16 exactly, probabilities float16. Sums and softmax are float32. With a 16-bit cache
queries and probabilities have its type.

The portable twin with the same tiling is :mod:`.paged`; the tests run both in Triton's interpreter.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from step128_kernels.attention.rdna_tiles import (
    CHUNK,
    LEAST,
    SHIFT,
    halves,
    load_queries,
    page_offset,
    split_span,
    tile_span,
    to_element,
    wmma,
)

ROWS = gl.constexpr(16)
"""Query rows of a wave: the rows of one WMMA."""


@gluon.jit
def _scores(q0, q1, k, k_other, RDNA4: gl.constexpr, FP8: gl.constexpr, scores: gl.constexpr):
    """``q @ K`` of one half of a tile's keys, unscaled.

    ``q0``, ``q1`` ``[16, D / 2]``: with FP8 the even and the odd dimensions, which are the low and the high bytes of
    ``k`` int16 ``[D / 2, N]``; else the first and the second half, which ``k`` and ``k_other`` hold.
    """
    N: gl.constexpr = k.shape[1]
    total = gl.zeros([ROWS, N], gl.float32, layout=scores)
    if FP8:
        for i in gl.static_range(k.shape[0] // CHUNK):
            even, odd = halves(gl.amd.slice(k, [CHUNK, N], [CHUNK * i, 0]), RDNA4)
            total = wmma(gl.amd.slice(q0, [ROWS, CHUNK], [0, CHUNK * i]), even, total, RDNA4)
            total = wmma(gl.amd.slice(q1, [ROWS, CHUNK], [0, CHUNK * i]), odd, total, RDNA4)
            gl.amd.hint.sched_barrier()
    else:
        total = wmma(q1, k_other, wmma(q0, k, total, RDNA4), RDNA4)
        gl.amd.hint.sched_barrier()
    return total


@gluon.jit
def _values(p0, p1, v_ptr, v_other_ptr, ok0, ok1, total, RDNA4: gl.constexpr, FP8: gl.constexpr, MASKED: gl.constexpr):
    """``p @ V`` of half of the dimensions, added to ``total``.

    ``p0`` and ``p1`` ``[16, N]`` are for the two halves of a tile's keys: with FP8 the low and the high bytes at
    ``v_ptr``, else what ``v_ptr`` and ``v_other_ptr`` point to.
    """
    # What was never written may be NaN, and 0 * NaN is NaN: so keys that no row sees are zeros.
    if FP8:
        word = gl.load(v_ptr)
        if MASKED:
            word = word & (gl.where(ok0, 0x00FF, 0) | gl.where(ok1, 0xFF00, 0)).to(gl.int16)[:, None]
        v0, v1 = halves(word, RDNA4)
    else:
        v0, v1 = gl.load(v_ptr), gl.load(v_other_ptr)
        if MASKED:
            v0 = gl.where(ok0[:, None], v0, gl.zeros_like(v0))
            v1 = gl.where(ok1[:, None], v1, gl.zeros_like(v1))
    total = wmma(p1, v1, wmma(p0, v0, total, RDNA4), RDNA4)
    gl.amd.hint.sched_barrier()
    return total


@gluon.jit
def _tile(
    q0, q1, first_total, second_total, top, mass, factor, cache_ptr, offset0, offset1, k_offsets, v_offsets,
    k_column, v_row, key, position, context, lowest,
    WINDOW: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, ONE_PAGE: gl.constexpr, FP8: gl.constexpr,
    ELEMENT: gl.constexpr, RDNA4: gl.constexpr, MASKED: gl.constexpr, scores: gl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_N keys: scores, running softmax, values.

    A tile's keys are two halves of N = BLOCK_N / 2: with FP8 keys 0-7 and 8-15 of every granule, else the first and the
    last granules. ``k_column`` and ``v_row`` say which granule of the tile a column of K or a row of V lies in.
    """
    N: gl.constexpr = BLOCK_N // 2
    HALF_KEYS: gl.constexpr = 8 if FP8 else N  # from a key of the first half to its twin in the second
    GRANULE: gl.constexpr = 16 * D if FP8 else 32 * D
    K_HALF: gl.constexpr = 64 if FP8 else BLOCK_N // 32 * GRANULE
    if ONE_PAGE:
        k0_ptr = cache_ptr + offset0 + k_offsets
        k1_ptr = k0_ptr + K_HALF
        v0_ptr = cache_ptr + offset0 + v_offsets
        v1_ptr = v0_ptr + BLOCK_N // 32 * GRANULE
    else:  # two granules, each in a page of its own
        offset1 = offset1 - GRANULE
        if FP8:
            k_from = gl.where(k_column == 0, offset0, offset1)[None, :] + k_offsets
            k0_ptr = cache_ptr + gl.max_contiguous(gl.multiple_of(k_from, [8, 8]), [8, 1])
            k1_ptr = k0_ptr + K_HALF
            v_from = gl.where(v_row == 0, offset0, offset1)[:, None] + v_offsets
            v0_ptr = cache_ptr + gl.max_contiguous(gl.multiple_of(v_from, [8, 8]), [8, 1])
            v1_ptr = v0_ptr
        else:
            k0_ptr = cache_ptr + offset0 + k_offsets
            k1_ptr = cache_ptr + offset1 + GRANULE + k_offsets
            v0_ptr = cache_ptr + offset0 + v_offsets
            v1_ptr = cache_ptr + offset1 + GRANULE + v_offsets
    k0 = gl.load(k0_ptr)
    if FP8:
        k1 = gl.load(k1_ptr)
        s0 = _scores(q0, q1, k0, k0, RDNA4, FP8, scores)
        s1 = _scores(q0, q1, k1, k1, RDNA4, FP8, scores)
    else:  # RDNA3 holds operands twice: registers for one half only
        s0 = _scores(q0, q1, k0, gl.load(k0_ptr + 8 * D), RDNA4, FP8, scores)
        s1 = _scores(q0, q1, gl.load(k1_ptr), gl.load(k1_ptr + 8 * D), RDNA4, FP8, scores)
    inside0, inside1 = v_row == 0, v_row == 0
    if MASKED:
        column = gl.arange(0, N, layout=gl.SliceLayout(0, scores))
        key0 = key + (column // 8 * 16 + column % 8 if FP8 else column)
        key1 = key0 + HALF_KEYS
        see0 = key0[None, :] <= position[:, None]
        see1 = key1[None, :] <= position[:, None]
        if WINDOW > 0:
            see0 = see0 & (key0[None, :] > position[:, None] - WINDOW)
            see1 = see1 & (key1[None, :] > position[:, None] - WINDOW)
        s0 = gl.where(see0, s0, float("-inf"))
        s1 = gl.where(see1, s1, float("-inf"))
        row = gl.arange(0, N, layout=v_row.type.layout)
        row_key0 = key + (row // 8 * 16 + row % 8 if FP8 else row)
        inside0 = (row_key0 < context) & (row_key0 >= lowest)
        inside1 = (row_key0 + HALF_KEYS < context) & (row_key0 + HALF_KEYS >= lowest)
    new_top = gl.maximum(top, gl.max(gl.maximum(s0, s1), 1) * factor)
    fade = gl.exp2(top - new_top)
    base = (new_top - SHIFT)[:, None]
    p0 = gl.exp2(s0 * factor[:, None] - base)
    p1 = gl.exp2(s1 * factor[:, None] - base)
    mass = mass * fade + gl.sum(p0 + p1, 1)
    first_total = first_total * fade[:, None]
    second_total = second_total * fade[:, None]
    operand: gl.constexpr = q0.type.layout
    PROBABILITY: gl.constexpr = "fp16" if FP8 else ELEMENT
    p0 = gl.convert_layout(to_element(p0, PROBABILITY, True), operand)
    p1 = gl.convert_layout(to_element(p1, PROBABILITY, True), operand)
    gl.amd.hint.sched_barrier()
    first_total = _values(p0, p1, v0_ptr, v1_ptr, inside0, inside1, first_total, RDNA4, FP8, MASKED)
    second: gl.constexpr = 4 * D if FP8 else 8 * D  # from the first to the second half of V's dimensions
    second_total = _values(p0, p1, v0_ptr + second, v1_ptr + second, inside0, inside1, second_total, RDNA4, FP8, MASKED)
    return first_total, second_total, new_top, mass


@gluon.jit(do_not_specialize=["splits", "least_tiles", "most_query_tokens", "table_stride", "heads"])
def attention_decode_kernel(
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
    most_query_tokens,
    GQA: gl.constexpr,
    D: gl.constexpr,
    PAGE: gl.constexpr,
    WINDOW: gl.constexpr,
    BLOCK_N: gl.constexpr,
    FP8: gl.constexpr,
    ELEMENT: gl.constexpr,
    DIRECT: gl.constexpr,
    RDNA4: gl.constexpr,
):
    """Attention of up to 16 query rows of one sequence and KV head over one part of the keys.

    Grid: row tiles, KV heads x splits, sequences. Sequences with more than ``most_query_tokens`` are left to prefill.

    Args:
        query_ptr: ``[tokens, heads, D]``; with FP8 int32 words of two elements. ``query_stride`` a token.
        cache_ptr: int16 for FP8 (two values a word), else the cache's type; page order.
        table_ptr: int32 pages by sequence, ``table_stride`` a row.
        lengths_ptr: int32, keys of each sequence.
        starts_ptr: int32, first token of each sequence, and the end.
        k_scale_ptr, v_scale_ptr: float32 scalars; not read without FP8.
        out_ptr: ``[tokens, heads, D]``; written if DIRECT, which needs one split.
        partial_ptr: float32 ``[sequences, most_query_tokens, heads, splits, D]``: normalized within the split.
        mass_ptr: float32 ``[sequences, most_query_tokens, heads, splits]``: log2 of the split's sum of exponentials.
        scale: of the scores.
        query_stride, block_stride, head_stride, table_stride: in elements of their tensor; of the cache in its words.
    """
    scores: gl.constexpr = gl.amd.AMDWMMALayout(
        version=2 if RDNA4 else 1, transposed=True, warp_bases=[], instr_shape=[16, 16, 16]
    )
    left: gl.constexpr = gl.DotOperandLayout(0, scores, 8 if RDNA4 else 16)
    right: gl.constexpr = gl.DotOperandLayout(1, scores, 8 if RDNA4 else 16)
    N: gl.constexpr = BLOCK_N // 2
    UNITS: gl.constexpr = D if FP8 else 2 * D
    ONE_PAGE: gl.constexpr = PAGE % BLOCK_N == 0
    head = gl.program_id(1) // splits
    split = gl.program_id(1) % splits
    sequence = gl.program_id(2)
    start = gl.load(starts_ptr + sequence)
    query_tokens = gl.load(starts_ptr + sequence + 1) - start
    context = gl.load(lengths_ptr + sequence)
    first_row = gl.program_id(0) * ROWS
    if (first_row >= query_tokens * GQA) | (query_tokens > most_query_tokens):
        return
    first, full_first, full_last, last = tile_span(context, query_tokens, first_row, ROWS, GQA, WINDOW, BLOCK_N)
    begin, end = split_span(first, last, split, splits, least_tiles)

    out_row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, scores))
    out_token = out_row // GQA
    out_head = head * GQA + out_row % GQA
    is_row = out_token < query_tokens
    slot = ((sequence * most_query_tokens + out_token) * heads + out_head) * splits + split
    if begin >= end:
        gl.store(mass_ptr + slot, gl.full([ROWS], float("-inf"), gl.float32, layout=slot.type.layout), mask=is_row)
        return

    q_row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, left))
    q_token = start + gl.minimum(q_row // GQA, query_tokens - 1)
    WORDS: gl.constexpr = D // 2 if FP8 else D  # of a query head
    q_offsets = q_token * query_stride + (head * GQA + q_row % GQA) * WORDS
    q0, q1, factor = load_queries(query_ptr, q_offsets, scale, k_scale_ptr, D, FP8, ELEMENT, left)
    factor = gl.convert_layout(factor, gl.SliceLayout(1, scores))
    v_scale = 1.0
    if FP8:
        v_scale = gl.load(v_scale_ptr)

    k_dim = gl.arange(0, D // 2, layout=gl.SliceLayout(1, right))
    k_key = gl.arange(0, N, layout=gl.SliceLayout(0, right))
    v_key = gl.arange(0, N, layout=gl.SliceLayout(1, right))
    v_dim = gl.arange(0, D // 2, layout=gl.SliceLayout(0, right))
    GRANULE: gl.constexpr = 16 * UNITS
    KEYS: gl.constexpr = 8 if FP8 else 16  # of a granule that lie in the same half of a tile
    k_offsets = (k_dim // 8 * 128 + k_dim % 8)[:, None] + (k_key // KEYS * GRANULE + k_key % KEYS * 8)[None, :]
    v_offsets = (v_key // KEYS * GRANULE + v_key % KEYS)[:, None] + (v_dim * KEYS)[None, :] + GRANULE // 2

    table_ptr += sequence * table_stride
    cache_ptr += head.to(gl.int64) * head_stride
    position = context - query_tokens + gl.minimum(out_token, query_tokens - 1)
    lowest = first_row * 0
    if WINDOW > 0:
        lowest = context - query_tokens + first_row // GQA - WINDOW + 1
    top = gl.full([ROWS], LEAST, gl.float32, layout=gl.SliceLayout(1, scores))
    mass = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, scores))
    first_total = gl.zeros([ROWS, D // 2], gl.float32, layout=scores)
    second_total = gl.zeros([ROWS, D // 2], gl.float32, layout=scores)

    full_first = gl.minimum(gl.maximum(full_first, begin), end)
    full_last = gl.minimum(gl.maximum(full_last, full_first), end)
    # Where the next tile lies is looked up one tile ahead.
    next0 = page_offset(table_ptr, full_first * BLOCK_N, context, block_stride, PAGE, UNITS)
    next1 = page_offset(table_ptr, full_first * BLOCK_N + 16, context, block_stride, PAGE, UNITS)
    for tile in range(full_first, full_last):
        offset0, offset1 = next0, next1
        next0 = page_offset(table_ptr, (tile + 1) * BLOCK_N, context, block_stride, PAGE, UNITS)
        next1 = page_offset(table_ptr, (tile + 1) * BLOCK_N + 16, context, block_stride, PAGE, UNITS)
        first_total, second_total, top, mass = _tile(
            q0, q1, first_total, second_total, top, mass, factor, cache_ptr, offset0, offset1, k_offsets, v_offsets,
            k_key // KEYS, v_key // KEYS, 0, position, context, lowest,
            WINDOW, BLOCK_N, D, ONE_PAGE, FP8, ELEMENT, RDNA4, False, scores,
        )  # fmt: skip
    # Then the tiles that some row must mask: before the full ones (a window's start) and after them.
    for number in range(begin, end - (full_last - full_first)):
        key = gl.where(number < full_first, number, number + full_last - full_first) * BLOCK_N
        offset0 = page_offset(table_ptr, key, context, block_stride, PAGE, UNITS)
        offset1 = page_offset(table_ptr, key + 16, context, block_stride, PAGE, UNITS)
        first_total, second_total, top, mass = _tile(
            q0, q1, first_total, second_total, top, mass, factor, cache_ptr, offset0, offset1, k_offsets, v_offsets,
            k_key // KEYS, v_key // KEYS, key, position, context, lowest,
            WINDOW, BLOCK_N, D, ONE_PAGE, FP8, ELEMENT, RDNA4, True, scores,
        )  # fmt: skip

    share = gl.where(mass > 0, v_scale / mass, 0.0)[:, None]
    dim = gl.arange(0, D // 2, layout=gl.SliceLayout(0, scores))
    if DIRECT:
        offsets = (((start + out_token) * heads + out_head) * D)[:, None] + dim[None, :]
        gl.store(
            out_ptr + offsets,
            to_element(first_total * share, ELEMENT, True),
            mask=is_row[:, None] & (dim >= 0)[None, :],
        )
        gl.store(
            out_ptr + (offsets + D // 2),
            to_element(second_total * share, ELEMENT, True),
            mask=is_row[:, None] & (dim >= 0)[None, :],
        )
    else:
        offsets = (slot * D)[:, None] + dim[None, :]
        gl.store(partial_ptr + offsets, first_total * share, mask=is_row[:, None] & (dim >= 0)[None, :])
        gl.store(partial_ptr + (offsets + D // 2), second_total * share, mask=is_row[:, None] & (dim >= 0)[None, :])
        gl.store(mass_ptr + slot, gl.where(mass > 0, top + gl.log2(mass) - SHIFT, float("-inf")), mask=is_row)
