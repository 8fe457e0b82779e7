"""NL4 linear layer for few activation rows: one weight row a lane, dot products of two, no WMMA tile to waste."""

from __future__ import annotations

import triton
import triton.language as tl

from step128_kernels.nl4_tiles import decode_rows, tile_offsets, to_element


@triton.jit(do_not_specialize=["m"])
def nl4_gemm_decode_kernel(
    x_ptr,
    tiles_ptr,
    scales_ptr,
    codebook_ptr,
    y_ptr,
    m,
    n,
    k,
    BLOCK_M: tl.constexpr,
    REPEAT: tl.constexpr,
    SPLIT_K: tl.constexpr,
    LANES: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ELEMENT: tl.constexpr,
    AMD: tl.constexpr,
):
    """``y [m, n] = x [m, k] @ W.T``; a program makes REPEAT * LANES columns of BLOCK_M rows of y.

    Programs next to each other share weights, which the second then finds in the cache.

    ``x`` comes as int64 words (k * element size / 8 a row). EVEN_N: n is a multiple of REPEAT * LANES.
    """
    WORDS_PER_16: tl.constexpr = 8 if ELEMENT == "fp32" else 4
    first = tl.program_id(1) * (REPEAT * LANES)
    rows = first + tl.arange(0, REPEAT)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    inside = rows if EVEN_N else tl.minimum(rows, n - 1)
    offsets = tile_offsets(inside, tl.cdiv(k, 32), 0)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_offsets = tl.minimum(token, m - 1) * (k // 16 * WORDS_PER_16)
    y = decode_rows(
        x_ptr, x_offsets, tiles_ptr, scales_ptr, offsets, codebook_ptr, k,
        BLOCK_M, REPEAT, SPLIT_K, LANES, EVEN_K, ELEMENT, AMD,
    )  # fmt: skip
    column = rows[None, :, :]
    mask = token[:, None, None] < m
    if not EVEN_N:
        mask = mask & (column < n)
    tl.store(y_ptr + token[:, None, None] * n + column, to_element(y, ELEMENT, AMD), mask=mask)
