"""NL4 linear layer for many activation rows: weights dequantized in registers, then WMMA."""

from __future__ import annotations

import triton
import triton.language as tl

from step128_kernels.nl4_tiles import dense_tiles, tile_offsets, to_element


@triton.jit(do_not_specialize=["m"])
def nl4_gemm_prefill_kernel(
    x_ptr,
    tiles_ptr,
    scales_ptr,
    codebook_ptr,
    y_ptr,
    m,
    n,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ELEMENT: tl.constexpr,
    AMD: tl.constexpr,
):
    """``y [m, n] = x [m, k] @ W.T``; a program makes a BLOCK_M x BLOCK_N block of y.

    Programs next to each other share a weight block, which the second then finds in the cache. EVEN_N, EVEN_K: n and
    k are multiples of the block sizes.
    """
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = column if EVEN_N else tl.minimum(column, n - 1)
    tile = tl.arange(0, BLOCK_K // 32)
    column_tiles = tl.cdiv(k, 32)
    offsets = tile_offsets(rows[:, None], column_tiles, tile[None, :])
    along_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(token, m - 1)[:, None] * k + along_k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, tl.cdiv(k, BLOCK_K)):
        if EVEN_K:
            x = tl.load(x_ptrs)
            inside = None
        else:
            x = tl.load(x_ptrs, mask=(start * BLOCK_K + along_k < k)[None, :], other=0.0)
            inside = (rows[:, None] >= 0) & (start * (BLOCK_K // 32) + tile < column_tiles)[None, :]
        weight = dense_tiles(
            tiles_ptr, scales_ptr, offsets, inside, codebook_ptr, BLOCK_N, BLOCK_K, EVEN_K, ELEMENT, AMD
        )
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
        x_ptrs += BLOCK_K
        offsets += BLOCK_K // 32 * 16
    mask = (token < m)[:, None] & (column < n)[None, :]
    tl.store(y_ptr + token[:, None] * n + column[None, :], to_element(total, ELEMENT, AMD), mask=mask)
