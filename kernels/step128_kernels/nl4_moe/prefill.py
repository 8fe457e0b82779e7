"""NL4 experts for many tokens: blocks of tokens by expert, weights dequantized in registers, then WMMA."""

from __future__ import annotations

import triton
import triton.language as tl

from step128_kernels.nl4_moe.epilogue import clamped_swiglu
from step128_kernels.nl4_tiles import dense_tiles, tile_offsets, to_element


@triton.jit
def _tiles_inside(rows, tile, start, column_tiles, EVEN_K: tl.constexpr):
    """Mask [rows, tiles] of the column tiles that exist, or None."""
    if EVEN_K:
        inside = None
    else:
        inside = (rows[:, None] >= 0) & (start + tile < column_tiles)[None, :]
    return inside


@triton.jit
def nl4_moe_gate_up_prefill_kernel(
    x_ptr,
    tiles_ptr,
    scales_ptr,
    codebook_ptr,
    block_experts_ptr,
    block_pairs_ptr,
    hidden_ptr,
    n,
    k,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LIMIT: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ELEMENT: tl.constexpr,
    AMD: tl.constexpr,
):
    """``hidden [pairs, n] = swiglu(x[token] @ W13[expert].T)``; a program makes BLOCK_N columns for a block of pairs.

    Program (j, i): columns j * BLOCK_N and on of block i, each from its gate row and its up row.
    """
    block = tl.program_id(1)
    expert = tl.load(block_experts_ptr + block)
    if expert >= 0:
        pair = tl.load(block_pairs_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
        token = tl.maximum(pair, 0) // TOP_K
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = column if EVEN_N else tl.minimum(column, n - 1)
        tile = tl.arange(0, BLOCK_K // 32)
        column_tiles = tl.cdiv(k, 32)
        gate_at = tile_offsets(rows[:, None], column_tiles, tile[None, :]) + expert * (2 * n * column_tiles)
        up_at = gate_at + n * column_tiles
        along_k = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + token[:, None] * k + along_k[None, :]
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, tl.cdiv(k, BLOCK_K)):
            if EVEN_K:
                x = tl.load(x_ptrs)
            else:
                x = tl.load(x_ptrs, mask=(start * BLOCK_K + along_k < k)[None, :], other=0.0)
            inside = _tiles_inside(rows, tile, start * (BLOCK_K // 32), column_tiles, EVEN_K)
            weight = dense_tiles(
                tiles_ptr, scales_ptr, gate_at, inside, codebook_ptr, BLOCK_N, BLOCK_K, EVEN_K, ELEMENT, AMD
            )
            gate = tl.dot(x, tl.trans(weight), gate, input_precision="ieee")
            weight = dense_tiles(
                tiles_ptr, scales_ptr, up_at, inside, codebook_ptr, BLOCK_N, BLOCK_K, EVEN_K, ELEMENT, AMD
            )
            up = tl.dot(x, tl.trans(weight), up, input_precision="ieee")
            x_ptrs += BLOCK_K
            gate_at += BLOCK_K // 32 * 16
            up_at += BLOCK_K // 32 * 16
        hidden = clamped_swiglu(gate, up, LIMIT)
        mask = (pair >= 0)[:, None] & (column < n)[None, :]
        place = hidden_ptr + pair[:, None] * n + column[None, :]
        tl.store(place, to_element(hidden, ELEMENT, AMD), mask=mask)


@triton.jit
def nl4_moe_down_prefill_kernel(
    hidden_ptr,
    tiles_ptr,
    scales_ptr,
    codebook_ptr,
    block_experts_ptr,
    block_pairs_ptr,
    topk_weights_ptr,
    partial_ptr,
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
    """``partial [pairs, n] = topk_weight[pair] * (hidden[pair] @ W2[expert].T)`` for a block of pairs."""
    block = tl.program_id(1)
    expert = tl.load(block_experts_ptr + block)
    if expert >= 0:
        pair = tl.load(block_pairs_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
        row = tl.maximum(pair, 0)
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = column if EVEN_N else tl.minimum(column, n - 1)
        tile = tl.arange(0, BLOCK_K // 32)
        column_tiles = tl.cdiv(k, 32)
        offsets = tile_offsets(rows[:, None], column_tiles, tile[None, :])
        offsets += expert * (tl.cdiv(n, 16) * 16 * column_tiles)
        along_k = tl.arange(0, BLOCK_K)
        hidden_ptrs = hidden_ptr + row[:, None] * k + along_k[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, tl.cdiv(k, BLOCK_K)):
            if EVEN_K:
                hidden = tl.load(hidden_ptrs)
            else:
                hidden = tl.load(hidden_ptrs, mask=(start * BLOCK_K + along_k < k)[None, :], other=0.0)
            inside = _tiles_inside(rows, tile, start * (BLOCK_K // 32), column_tiles, EVEN_K)
            weight = dense_tiles(
                tiles_ptr, scales_ptr, offsets, inside, codebook_ptr, BLOCK_N, BLOCK_K, EVEN_K, ELEMENT, AMD
            )
            total = tl.dot(hidden, tl.trans(weight), total, input_precision="ieee")
            hidden_ptrs += BLOCK_K
            offsets += BLOCK_K // 32 * 16
        total = total * tl.load(topk_weights_ptr + row)[:, None]
        mask = (pair >= 0)[:, None] & (column < n)[None, :]
        place = partial_ptr + pair[:, None] * n + column[None, :]
        tl.store(place, to_element(total, ELEMENT, AMD), mask=mask)
