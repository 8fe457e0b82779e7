"""What linear and expert kernels share: rows of tiles times a few activations, and tiles made dense for WMMA."""

from __future__ import annotations

import triton
import triton.language as tl

from step128_kernels.codebook import SCALE_DIVISOR
from step128_kernels.nl4_lookup import CODE_OFFSET, code, code_bytes, code_pairs, dot2, permute, scale_of

_ROWS_PER_TILE = tl.constexpr(16)
_DIVISOR = tl.constexpr(float(SCALE_DIVISOR))
_HIGH_HALVES = tl.constexpr(0x07060302)
_ROUND_HALF_UP = tl.constexpr(0x8000)


@triton.jit
def tile_offsets(rows, column_tiles, tile):
    """Where row ``rows`` of column tile ``tile`` lies in ``scales`` (and, times two, in ``tiles``)."""
    return (rows // _ROWS_PER_TILE) * (column_tiles * _ROWS_PER_TILE) + rows % _ROWS_PER_TILE + tile * _ROWS_PER_TILE


@triton.jit
def _load(pointers, mask):
    """Load, with zeros where a mask is given and false."""
    if mask is None:
        value = tl.load(pointers)
    else:
        value = tl.load(pointers, mask=mask, other=0)
    return value


@triton.jit
def _pair(x_ptrs, x_mask, pair: tl.constexpr, ELEMENT: tl.constexpr):
    """Activations 2 * pair and 2 * pair + 1 of a group as float32, from its int64 words."""
    if ELEMENT == "fp32":
        both = _load(x_ptrs + pair, x_mask)
        first = both.to(tl.int32).to(tl.float32, bitcast=True)
        second = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        both = (_load(x_ptrs + pair // 2, x_mask) >> (32 * (pair % 2))).to(tl.int32)
        if ELEMENT == "fp16":
            first = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            second = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            first = (both << 16).to(tl.float32, bitcast=True)
            second = (both & -65536).to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def _group_dot(group, x_ptrs, x_mask, codebook_ptr, zeros, ELEMENT: tl.constexpr, AMD: tl.constexpr):
    """Sixteen codes (one int64) times sixteen activations: int64 [R, S, L] and [M, 1, S, 1] to float32 [M, R, S, L].

    The sum starts anew in every group: dot2 units cut their terms to a grid (ROCm/rocm-systems issue 12056), and what
    that loses must not pile up along K.
    """
    total = zeros
    for half in tl.static_range(2):
        word = (group >> (32 * half)).to(tl.int32)
        if AMD:
            p01, p23, p45, p67 = code_pairs(word, ELEMENT == "fp16")
            x0123 = _load(x_ptrs + 2 * half, x_mask)
            x4567 = _load(x_ptrs + (2 * half + 1), x_mask)
            total = dot2(p01[None], x0123.to(tl.int32), total, ELEMENT == "fp16")
            total = dot2(p23[None], (x0123 >> 32).to(tl.int32), total, ELEMENT == "fp16")
            total = dot2(p45[None], x4567.to(tl.int32), total, ELEMENT == "fp16")
            total = dot2(p67[None], (x4567 >> 32).to(tl.int32), total, ELEMENT == "fp16")
        else:
            for pair in tl.static_range(4):
                first, second = _pair(x_ptrs, x_mask, 4 * half + pair, ELEMENT)
                total += code(word, 2 * pair, codebook_ptr)[None] * first
                total += code(word, 2 * pair + 1, codebook_ptr)[None] * second
    return total


@triton.jit
def decode_rows(
    x_ptr,
    x_offsets,
    tiles_ptr,
    scales_ptr,
    offsets,
    codebook_ptr,
    k,
    BLOCK_M: tl.constexpr,
    REPEAT: tl.constexpr,
    SPLIT_K: tl.constexpr,
    LANES: tl.constexpr,
    EVEN_K: tl.constexpr,
    ELEMENT: tl.constexpr,
    AMD: tl.constexpr,
):
    """Products of a few activation rows with REPEAT x LANES weight rows, each lane its own row; no cross-lane work
    until the end, where the SPLIT_K parts of K (side by side on different warps) are added.

    Args:
        x_ptr: int64 words of the activations.
        x_offsets: [BLOCK_M], in int64 words, where each activation row starts.
        tiles_ptr, scales_ptr: a weight in kernel layout.
        offsets: [REPEAT, LANES] places of the rows in ``scales`` (:func:`tile_offsets` at column tile 0).
        codebook_ptr: float32 [16], the codes over 128.
        k: columns of the weight.
        EVEN_K: K is a multiple of 32 * SPLIT_K: no masks.
        ELEMENT: "bf16", "fp16" or "fp32", the activations' type ("fp32" not with AMD).

    Returns:
        float32 [BLOCK_M, REPEAT, LANES].
    """
    WORDS: tl.constexpr = 8 if ELEMENT == "fp32" else 4  # int64 words of a group of activations
    part = tl.arange(0, SPLIT_K)
    places = offsets[:, None, :] + (part * _ROWS_PER_TILE)[None, :, None]
    # One scale word a lane, like the tiles: a wider load would spread rows over lanes otherwise, and cost a barrier.
    scale_ptrs = scales_ptr + tl.max_contiguous(places, (1, 1, 1))
    tile_ptrs = tiles_ptr + (places * 2)[:, :, :, None]
    tile_ptrs += tl.arange(0, 2)[None, None, None, :]
    x_ptrs = x_ptr + x_offsets[:, None, None, None] + (part * (2 * WORDS))[None, None, :, None]
    total = tl.zeros((BLOCK_M, REPEAT, SPLIT_K, LANES), tl.float32)
    zeros = tl.zeros((BLOCK_M, REPEAT, SPLIT_K, LANES), tl.float32)
    tiles = tl.cdiv(k, 32)
    for tile in range(0, tiles, SPLIT_K):
        if EVEN_K:
            group0, group1 = tl.split(tl.load(tile_ptrs))
            scales = tl.load(scale_ptrs)
        else:
            inside = (tile + part < tiles)[None, :, None]
            group0, group1 = tl.split(tl.load(tile_ptrs, mask=inside[:, :, :, None], other=0))
            scales = tl.load(scale_ptrs, mask=inside, other=0)
        for group in tl.static_range(2):
            word = group0 if group == 0 else group1
            x_mask = None if EVEN_K else ((tile + part) * 32 + 16 * group < k)[None, None, :, None]
            dot = _group_dot(word, x_ptrs + WORDS * group, x_mask, codebook_ptr, zeros, ELEMENT, AMD)
            total += dot * scale_of(scales, group)[None]
        tile_ptrs += SPLIT_K * (_ROWS_PER_TILE * 2)
        scale_ptrs += SPLIT_K * _ROWS_PER_TILE
        x_ptrs += SPLIT_K * (2 * WORDS)
    return tl.sum(total, axis=2)


@triton.jit
def dense_tiles(
    tiles_ptr,
    scales_ptr,
    offsets,
    inside,
    codebook_ptr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    ELEMENT: tl.constexpr,
    AMD: tl.constexpr,
):
    """A block of a weight, dequantized: [BLOCK_N, BLOCK_K] of ELEMENT.

    Args:
        offsets: [BLOCK_N, BLOCK_K / 32] places in ``scales``.
        inside: the same shape, or None with EVEN_K; outside, the weight is 0.
    """
    places = (offsets * 2)[:, :, None] + tl.arange(0, 2)[None, None, :]
    if EVEN_K:
        group0, group1 = tl.split(tl.load(tiles_ptr + places))
        scales = tl.load(scales_ptr + offsets)
    else:
        group0, group1 = tl.split(tl.load(tiles_ptr + places, mask=inside[:, :, None], other=0))
        scales = tl.load(scales_ptr + offsets, mask=inside, other=0)
    low00, high00 = code_bytes(group0.to(tl.int32), codebook_ptr, AMD)
    low01, high01 = code_bytes((group0 >> 32).to(tl.int32), codebook_ptr, AMD)
    low10, high10 = code_bytes(group1.to(tl.int32), codebook_ptr, AMD)
    low11, high11 = code_bytes((group1 >> 32).to(tl.int32), codebook_ptr, AMD)
    first = tl.join(tl.join(low00, high00), tl.join(low01, high01))  # [N, tile, word half, int64 half]
    second = tl.join(tl.join(low10, high10), tl.join(low11, high11))
    words = tl.permute(tl.join(first, second), (0, 1, 4, 3, 2))  # [N, tile, group, int64 half, word half]
    scale = tl.join(scale_of(scales, 0), scale_of(scales, 1))[:, :, :, None, None] * (1.0 / _DIVISOR)
    shift = scale * CODE_OFFSET
    w0 = (words & 255).to(tl.float32) * scale - shift
    w1 = ((words >> 8) & 255).to(tl.float32) * scale - shift
    w2 = ((words >> 16) & 255).to(tl.float32) * scale - shift
    w3 = (words.to(tl.uint32, bitcast=True) >> 24).to(tl.float32) * scale - shift
    if ELEMENT == "bf16":
        pairs = tl.join(_round_pair(w0, w1, AMD), _round_pair(w2, w3, AMD))
        even = pairs.to(tl.int16).to(tl.bfloat16, bitcast=True)
        odd = (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        dense = tl.join(even, odd)
    elif ELEMENT == "fp16":
        dense = tl.join(tl.join(w0.to(tl.float16), w2.to(tl.float16)), tl.join(w1.to(tl.float16), w3.to(tl.float16)))
    else:
        dense = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(dense, (BLOCK_N, BLOCK_K))


@triton.jit
def to_element(values, ELEMENT: tl.constexpr, AMD: tl.constexpr):
    """float32 to ELEMENT; to bfloat16 with ties away from zero, in two instructions instead of Triton's 5.5.

    A NaN whose low half is not 0 could round to -0: AMD's arithmetic makes none (its own is 0x7fc00000, and those it
    passes on come from 16-bit activations), NVIDIA's does.
    """
    if ELEMENT == "bf16":
        bits = values.to(tl.int32, bitcast=True)
        rounded = bits + _ROUND_HALF_UP
        if not AMD:
            rounded = tl.where(values != values, bits | 0x400000, rounded)
        element = (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif ELEMENT == "fp16":
        element = values.to(tl.float16)
    else:
        element = values
    return element


@triton.jit
def _round_pair(even, odd, AMD: tl.constexpr):
    """Two float32 to bfloat16 in one int32, ties away from zero: neither GPU converts float32 to bfloat16 itself, and
    Triton's own sequence costs 5.5 instructions a value against 1.5.
    """
    low = even.to(tl.int32, bitcast=True) + _ROUND_HALF_UP
    high = odd.to(tl.int32, bitcast=True) + _ROUND_HALF_UP
    if AMD:
        pair = permute(high, low, _HIGH_HALVES)
    else:
        pair = ((low >> 16) & 0xFFFF) | (high & -65536)
    return pair
