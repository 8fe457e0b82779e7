"""Attention for many query tokens on RDNA3 and RDNA4, in Gluon: waves of 16 query rows that share K and V in LDS.

Every wave of a work-group brings its part of a tile of keys, converts FP8 to float16 once, and stores it in LDS in the
order of WMMA's operands. While a tile is computed the next one is on its way in registers. So memory is read and
converted once for all BLOCK_M rows, and WMMA is what takes the time. The arithmetic is that of :mod:`.decode_rdna`.
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
    tile_span,
    to_element,
    wmma,
)


@gluon.jit
def _pick(granule, offset0, offset1, offset2, offset3, FP8: gl.constexpr, BLOCK_N: gl.constexpr):
    """Offsets of the granules of both halves of a tile.

    With FP8 both halves lie in all granules; else one or two granules are the first half's, as many the second's.
    """
    if FP8 and BLOCK_N == 64:
        low = gl.where(granule == 0, offset0, offset1)
        high = gl.where(granule == 2, offset2, offset3)
        first = gl.where(granule < 2, low, high)
        second = first
    elif BLOCK_N == 64:
        first = gl.where(granule == 0, offset0, offset1)
        second = gl.where(granule == 0, offset2, offset3)
    elif FP8:
        first = gl.where(granule == 0, offset0, offset1)
        second = first
    else:
        first = gl.where(granule == 0, offset0, offset0)
        second = gl.where(granule == 0, offset1, offset1)
    return first, second


@gluon.jit
def _fetch(
    cache_ptr, table_ptr, key, context, block_stride, k_offsets, v_offsets, k_granule, v_granule,
    D: gl.constexpr, PAGE: gl.constexpr, FP8: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Start loading a tile: K and V of its first and second half, each in two parts with a 16-bit cache."""
    UNITS: gl.constexpr = D if FP8 else 2 * D
    offset0 = page_offset(table_ptr, key, context, block_stride, PAGE, UNITS)
    offset1 = page_offset(table_ptr, key + 16, context, block_stride, PAGE, UNITS)
    offset2 = page_offset(table_ptr, key + 32, context, block_stride, PAGE, UNITS)
    offset3 = page_offset(table_ptr, key + 48, context, block_stride, PAGE, UNITS)
    k_from, k_later = _pick(k_granule, offset0, offset1, offset2, offset3, FP8, BLOCK_N)
    v_from, v_later = _pick(v_granule, offset0, offset1, offset2, offset3, FP8, BLOCK_N)
    # Page tables hide from the compiler that offsets run on along the first dimension. Said here, where they are made:
    # of a function's argument it would not be heard.
    RUN: gl.constexpr = 8 if FP8 else 16
    k_from = k_from[None, :] + k_offsets
    v_from = v_from[:, None] + v_offsets
    k_ptr = cache_ptr + gl.max_contiguous(gl.multiple_of(k_from, [8, 8]), [8, 1])
    v_ptr = cache_ptr + gl.max_contiguous(gl.multiple_of(v_from, [RUN, RUN]), [RUN, 1])
    if FP8:
        k0, k1 = gl.load(k_ptr), gl.load(k_ptr + 64)
        v0, v1 = gl.load(v_ptr), gl.load(v_ptr + 4 * D)
        k2, k3, v2, v3 = k0, k1, v0, v1
    else:
        k_later = k_later[None, :] + k_offsets
        v_later = v_later[:, None] + v_offsets
        k_later_ptr = cache_ptr + gl.max_contiguous(gl.multiple_of(k_later, [8, 8]), [8, 1])
        v_later_ptr = cache_ptr + gl.max_contiguous(gl.multiple_of(v_later, [RUN, RUN]), [RUN, 1])
        k0, k2 = gl.load(k_ptr), gl.load(k_ptr + 8 * D)
        k1, k3 = gl.load(k_later_ptr), gl.load(k_later_ptr + 8 * D)
        v0, v2 = gl.load(v_ptr), gl.load(v_later_ptr)
        v1, v3 = gl.load(v_ptr + 8 * D), gl.load(v_later_ptr + 8 * D)
    return k0, k1, k2, k3, v0, v1, v2, v3


@gluon.jit
def _to_lds(buffer, other, word, other_word, RDNA4: gl.constexpr, FP8: gl.constexpr):
    """Two operands into LDS: the low and the high bytes of ``word`` with FP8, else two loads as they are."""
    if FP8:
        low, high = halves(word, RDNA4)
        buffer.store(low)
        other.store(high)
    else:
        buffer.store(word)
        other.store(other_word)


@gluon.jit
def _scores(q0, q1, k0, k1, RDNA4: gl.constexpr, scores: gl.constexpr, right: gl.constexpr):
    """``q @ K`` of one half of a tile, from LDS."""
    total = gl.zeros([q0.shape[0], k0.shape[1]], gl.float32, layout=scores)
    for i in gl.static_range(k0.shape[0] // CHUNK):
        low = k0.slice(CHUNK * i, CHUNK, dim=0).load(right)
        high = k1.slice(CHUNK * i, CHUNK, dim=0).load(right)
        total = wmma(gl.amd.slice(q0, [q0.shape[0], CHUNK], [0, CHUNK * i]), low, total, RDNA4)
        total = wmma(gl.amd.slice(q1, [q1.shape[0], CHUNK], [0, CHUNK * i]), high, total, RDNA4)
        gl.amd.hint.sched_barrier()
    return total


@gluon.jit
def _values(p0, p1, v0, v1, total, RDNA4: gl.constexpr, right: gl.constexpr):
    total = wmma(p1, v1.load(right), wmma(p0, v0.load(right), total, RDNA4), RDNA4)
    gl.amd.hint.sched_barrier()
    return total


@gluon.jit
def _see(key, position, WINDOW: gl.constexpr):
    """Which keys ``[N]`` the rows ``[M]`` see."""
    see = key[None, :] <= position[:, None]
    if WINDOW > 0:
        see = see & (key[None, :] > position[:, None] - WINDOW)
    return see


@gluon.jit(do_not_specialize=["least_query_tokens", "table_stride", "heads"])
def attention_prefill_kernel(
    query_ptr,
    cache_ptr,
    table_ptr,
    lengths_ptr,
    starts_ptr,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    scale,
    query_stride,
    block_stride,
    head_stride,
    table_stride,
    heads,
    least_query_tokens,
    GQA: gl.constexpr,
    D: gl.constexpr,
    PAGE: gl.constexpr,
    WINDOW: gl.constexpr,
    BLOCK_N: gl.constexpr,
    FP8: gl.constexpr,
    ELEMENT: gl.constexpr,
    RDNA4: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Attention of 16 x WARPS query rows of one sequence and KV head.

    Grid: row blocks, KV heads, sequences. Sequences with fewer than ``least_query_tokens`` are left to the decode
    kernel; arguments as there.
    """
    BLOCK_M: gl.constexpr = 16 * WARPS
    N: gl.constexpr = BLOCK_N // 2
    warp_bases: gl.constexpr = [[1, 0], [2, 0]] if WARPS == 4 else [[1, 0], [2, 0], [4, 0]]
    scores: gl.constexpr = gl.amd.AMDWMMALayout(
        version=2 if RDNA4 else 1, transposed=True, warp_bases=warp_bases, instr_shape=[16, 16, 16]
    )
    left: gl.constexpr = gl.DotOperandLayout(0, scores, 8 if RDNA4 else 16)
    right: gl.constexpr = gl.DotOperandLayout(1, scores, 8 if RDNA4 else 16)
    # Lanes side by side load 16 bytes each from places side by side.
    k_layout: gl.constexpr = gl.BlockedLayout([8, 1], [4, 8], [2, WARPS // 2], [1, 0])
    v_lanes: gl.constexpr = [1, 32] if FP8 else [2, 16]
    v_order: gl.constexpr = [1, 0] if FP8 else [0, 1]
    v_layout: gl.constexpr = gl.BlockedLayout([8, 1], v_lanes, [WARPS // 2, 2], v_order)
    k_lds: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [0, 1])
    v_lds: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [0, 1])
    UNITS: gl.constexpr = D if FP8 else 2 * D
    GRANULE: gl.constexpr = 16 * UNITS
    KEYS: gl.constexpr = 8 if FP8 else 16

    head = gl.program_id(1)
    sequence = gl.program_id(2)
    start = gl.load(starts_ptr + sequence)
    query_tokens = gl.load(starts_ptr + sequence + 1) - start
    context = gl.load(lengths_ptr + sequence)
    first_row = gl.program_id(0) * BLOCK_M
    if (first_row >= query_tokens * GQA) | (query_tokens < least_query_tokens):
        return
    begin, full_first, full_last, end = tile_span(context, query_tokens, first_row, BLOCK_M, GQA, WINDOW, BLOCK_N)

    q_row = first_row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, left))
    q_token = (start + gl.minimum(q_row // GQA, query_tokens - 1)).to(gl.int64)
    WORDS: gl.constexpr = D // 2 if FP8 else D  # of a query head
    q_offsets = q_token * query_stride + (head * GQA + q_row % GQA) * WORDS
    q0, q1, factor = load_queries(query_ptr, q_offsets, scale, k_scale_ptr, D, FP8, ELEMENT, left)
    factor = gl.convert_layout(factor, gl.SliceLayout(1, scores))
    v_scale = 1.0
    if FP8:
        v_scale = gl.load(v_scale_ptr)
    out_row = first_row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, scores))
    out_token = out_row // GQA
    position = context - query_tokens + gl.minimum(out_token, query_tokens - 1)
    lowest = first_row * 0
    if WINDOW > 0:
        lowest = context - query_tokens + first_row // GQA - WINDOW + 1

    k_dim = gl.arange(0, D // 2, layout=gl.SliceLayout(1, k_layout))
    k_key = gl.arange(0, N, layout=gl.SliceLayout(0, k_layout))
    v_key = gl.arange(0, N, layout=gl.SliceLayout(1, v_layout))
    v_dim = gl.arange(0, D // 2, layout=gl.SliceLayout(0, v_layout))
    k_offsets = (k_dim // 8 * 128 + k_dim % 8)[:, None] + (k_key % KEYS * 8)[None, :]
    v_offsets = (v_key % KEYS)[:, None] + (v_dim * KEYS)[None, :] + GRANULE // 2
    v_key0 = v_key // 8 * 16 + v_key % 8 if FP8 else v_key
    HALF_KEYS: gl.constexpr = 8 if FP8 else N
    column = gl.arange(0, N, layout=gl.SliceLayout(0, scores))
    key0 = column // 8 * 16 + column % 8 if FP8 else column

    PROBABILITY: gl.constexpr = "fp16" if FP8 else ELEMENT
    element: gl.constexpr = q0.dtype
    ka0 = gl.allocate_shared_memory(element, [D // 2, N], k_lds)
    kb0 = gl.allocate_shared_memory(element, [D // 2, N], k_lds)
    ka1 = gl.allocate_shared_memory(element, [D // 2, N], k_lds)
    kb1 = gl.allocate_shared_memory(element, [D // 2, N], k_lds)
    va0 = gl.allocate_shared_memory(element, [N, D // 2], v_lds)
    vb0 = gl.allocate_shared_memory(element, [N, D // 2], v_lds)
    va1 = gl.allocate_shared_memory(element, [N, D // 2], v_lds)
    vb1 = gl.allocate_shared_memory(element, [N, D // 2], v_lds)

    table_ptr += sequence * table_stride
    cache_ptr += head.to(gl.int64) * head_stride
    top = gl.full([BLOCK_M], LEAST, gl.float32, layout=gl.SliceLayout(1, scores))
    mass = gl.zeros([BLOCK_M], gl.float32, layout=gl.SliceLayout(1, scores))
    first_total = gl.zeros([BLOCK_M, D // 2], gl.float32, layout=scores)
    second_total = gl.zeros([BLOCK_M, D // 2], gl.float32, layout=scores)
    k0, k1, k2, k3, v0, v1, v2, v3 = _fetch(
        cache_ptr, table_ptr, begin * BLOCK_N, context, block_stride, k_offsets, v_offsets,
        k_key // KEYS, v_key // KEYS, D, PAGE, FP8, BLOCK_N,
    )  # fmt: skip
    for tile in range(begin, end):
        key = tile * BLOCK_N
        is_full = (tile >= full_first) & (tile < full_last)
        if not is_full:
            # What was never written may be NaN, and 0 * NaN is NaN: so keys that no row sees are zeros.
            seen0 = (key + v_key0 < context) & (key + v_key0 >= lowest)
            seen1 = (key + v_key0 + HALF_KEYS < context) & (key + v_key0 + HALF_KEYS >= lowest)
            if FP8:
                bits = (gl.where(seen0, 0x00FF, 0) | gl.where(seen1, 0xFF00, 0)).to(gl.int16)[:, None]
                v0 = v0 & bits
                v1 = v1 & bits
            else:
                v0 = gl.where(seen0[:, None], v0, gl.zeros_like(v0))
                v1 = gl.where(seen0[:, None], v1, gl.zeros_like(v1))
                v2 = gl.where(seen1[:, None], v2, gl.zeros_like(v2))
                v3 = gl.where(seen1[:, None], v3, gl.zeros_like(v3))
        gl.barrier()
        _to_lds(ka0, kb0, k0, k2, RDNA4, FP8)
        _to_lds(ka1, kb1, k1, k3, RDNA4, FP8)
        _to_lds(va0, vb0, v0, v2, RDNA4, FP8)
        _to_lds(va1, vb1, v1, v3, RDNA4, FP8)
        gl.barrier()
        k0, k1, k2, k3, v0, v1, v2, v3 = _fetch(
            cache_ptr, table_ptr, key + BLOCK_N, context, block_stride, k_offsets, v_offsets,
            k_key // KEYS, v_key // KEYS, D, PAGE, FP8, BLOCK_N,
        )  # fmt: skip
        s0 = _scores(q0, q1, ka0, kb0, RDNA4, scores, right)
        s1 = _scores(q0, q1, ka1, kb1, RDNA4, scores, right)
        if not is_full:
            s0 = gl.where(_see(key + key0, position, WINDOW), s0, float("-inf"))
            s1 = gl.where(_see(key + key0 + HALF_KEYS, position, WINDOW), s1, float("-inf"))
        new_top = gl.maximum(top, gl.max(gl.maximum(s0, s1), 1) * factor)
        fade = gl.exp2(top - new_top)
        top = new_top
        base = (new_top - SHIFT)[:, None]
        p0 = gl.exp2(s0 * factor[:, None] - base)
        p1 = gl.exp2(s1 * factor[:, None] - base)
        mass = mass * fade + gl.sum(p0 + p1, 1)
        first_total = first_total * fade[:, None]
        second_total = second_total * fade[:, None]
        p0 = gl.convert_layout(to_element(p0, PROBABILITY, True), left)
        p1 = gl.convert_layout(to_element(p1, PROBABILITY, True), left)
        gl.amd.hint.sched_barrier()
        first_total = _values(p0, p1, va0, vb0, first_total, RDNA4, right)
        second_total = _values(p0, p1, va1, vb1, second_total, RDNA4, right)

    share = gl.where(mass > 0, v_scale / mass, 0.0)[:, None]
    dim = gl.arange(0, D // 2, layout=gl.SliceLayout(0, scores))
    offsets = (((start + out_token).to(gl.int64) * heads + head * GQA + out_row % GQA) * D)[:, None] + dim[None, :]
    mask = (out_token < query_tokens)[:, None] & (dim >= 0)[None, :]
    gl.store(out_ptr + offsets, to_element(first_total * share, ELEMENT, True), mask=mask)
    gl.store(out_ptr + (offsets + D // 2), to_element(second_total * share, ELEMENT, True), mask=mask)
