"""NL4 experts for few tokens: one weight row a lane. Gate and up with SwiGLU in one kernel, down in a second."""

from __future__ import annotations

import triton
import triton.language as tl

from step128_kernels.nl4_moe.epilogue import clamped_swiglu
from step128_kernels.nl4_tiles import decode_rows, tile_offsets, to_element


@triton.jit
def _pairs_of_block(block_pairs_ptr, block, BLOCK_M: tl.constexpr, ONE_PAIR: tl.constexpr):
    """Pair numbers of a block [BLOCK_M]. ONE_PAIR: block i is pair i, and its expert the chosen one."""
    within = tl.arange(0, BLOCK_M)
    if ONE_PAIR:
        pair = block + within
    else:
        pair = tl.load(block_pairs_ptr + block * BLOCK_M + within)
    return pair


@triton.jit
def nl4_moe_gate_up_decode_kernel(
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
    ONE_PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    REPEAT: tl.constexpr,
    SPLIT_K: tl.constexpr,
    LANES: tl.constexpr,
    LIMIT: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ELEMENT: tl.constexpr,
    AMD: tl.constexpr,
):
    """``hidden [pairs, n] = swiglu(x[token] @ W13[expert].T)`` for one block's pairs; gate rows before up rows.

    Program (j, i): columns j * REPEAT * LANES and on of block i. ``x`` comes as int64 words. A weight of n columns has
    2 n rows, n a multiple of 16.
    """
    WORDS_PER_16: tl.constexpr = 8 if ELEMENT == "fp32" else 4
    block = tl.program_id(1)
    expert = tl.load(block_experts_ptr + block).to(tl.int32)
    if expert >= 0:
        pair = _pairs_of_block(block_pairs_ptr, block, BLOCK_M, ONE_PAIR)
        token = tl.maximum(pair, 0) // TOP_K
        repeat = tl.arange(0, 2 * REPEAT)  # gate rows, then the same rows of up
        first = tl.program_id(0) * (REPEAT * LANES)
        column = first + (repeat % REPEAT)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        inside = column if EVEN_N else tl.minimum(column, n - 1)
        rows = inside + (repeat // REPEAT)[:, None] * n
        column_tiles = tl.cdiv(k, 32)
        offsets = tile_offsets(rows, column_tiles, 0) + expert * (2 * n * column_tiles)
        gate_up = decode_rows(
            x_ptr, token * (k // 16 * WORDS_PER_16), tiles_ptr, scales_ptr, offsets, codebook_ptr, k,
            BLOCK_M, 2 * REPEAT, SPLIT_K, LANES, EVEN_K, ELEMENT, AMD,
        )  # fmt: skip
        gate, up = tl.split(tl.permute(tl.reshape(gate_up, (BLOCK_M, 2, REPEAT, LANES)), (0, 2, 3, 1)))
        hidden = clamped_swiglu(gate, up, LIMIT)
        column = first + tl.arange(0, REPEAT)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]
        mask = (pair >= 0)[:, None, None]
        if not EVEN_N:
            mask = mask & (column < n)
        place = hidden_ptr + pair[:, None, None] * n + column
        tl.store(place, to_element(hidden, ELEMENT, AMD), mask=mask)


@triton.jit
def nl4_moe_down_decode_kernel(
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
    ONE_PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    REPEAT: tl.constexpr,
    SPLIT_K: tl.constexpr,
    LANES: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ELEMENT: tl.constexpr,
    AMD: tl.constexpr,
):
    """``partial [pairs, n] = topk_weight[pair] * (hidden[pair] @ W2[expert].T)`` for the pairs of one block.

    Program (j, i): columns j * REPEAT * LANES and on of block i. ``hidden`` comes as int64 words.
    """
    WORDS_PER_16: tl.constexpr = 8 if ELEMENT == "fp32" else 4
    block = tl.program_id(1)
    expert = tl.load(block_experts_ptr + block).to(tl.int32)
    if expert >= 0:
        pair = _pairs_of_block(block_pairs_ptr, block, BLOCK_M, ONE_PAIR)
        row = tl.maximum(pair, 0)
        column = tl.program_id(0) * (REPEAT * LANES) + tl.arange(0, REPEAT)[:, None] * LANES
        column += tl.arange(0, LANES)[None, :]
        inside = column if EVEN_N else tl.minimum(column, n - 1)
        column_tiles = tl.cdiv(k, 32)
        offsets = tile_offsets(inside, column_tiles, 0) + expert * (tl.cdiv(n, 16) * 16 * column_tiles)
        y = decode_rows(
            hidden_ptr, row * (k // 16 * WORDS_PER_16), tiles_ptr, scales_ptr, offsets, codebook_ptr, k,
            BLOCK_M, REPEAT, SPLIT_K, LANES, EVEN_K, ELEMENT, AMD,
        )  # fmt: skip
        y = y * tl.load(topk_weights_ptr + row)[:, None, None]
        mask = (pair >= 0)[:, None, None]
        if not EVEN_N:
            mask = mask & (column < n)[None, :, :]
        place = partial_ptr + pair[:, None, None] * n + column[None, :, :]
        tl.store(place, y, mask=mask)
