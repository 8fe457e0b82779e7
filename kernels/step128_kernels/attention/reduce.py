"""Joins the parts of the keys: a mean of the splits' results, weighted by their sums of exponentials."""

from __future__ import annotations

import triton
import triton.language as tl

from step128_kernels.nl4_tiles import to_element


@triton.jit(do_not_specialize=["splits", "most_query_tokens", "heads"])
def attention_reduce_kernel(
    partial_ptr,
    mass_ptr,
    starts_ptr,
    out_ptr,
    splits,
    most_query_tokens,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    ELEMENT: tl.constexpr,
    AMD: tl.constexpr,
):
    """BLOCK_D dimensions of one row of the output. Grid: sequences x query tokens x heads, D / BLOCK_D.

    Args:
        partial_ptr: float32 ``[sequences, most_query_tokens, heads, splits, D]``.
        mass_ptr: float32 ``[sequences, most_query_tokens, heads, splits]``, log2; minus infinity where a split had
            nothing to do, whose result was then never written.
        starts_ptr: int32, first token of each sequence, and the end.
        out_ptr: ``[tokens, heads, D]``.
        BLOCK_SPLITS: the least power of two that holds all splits.
        ELEMENT: type of the output, in Triton's spelling.
        AMD: on an AMD GPU (how NaN is rounded).
    """
    row = tl.program_id(0)
    head = row % heads
    token = row // heads % most_query_tokens
    sequence = row // heads // most_query_tokens
    start = tl.load(starts_ptr + sequence)
    query_tokens = tl.load(starts_ptr + sequence + 1) - start
    if (token >= query_tokens) | (query_tokens > most_query_tokens):
        return
    split = tl.arange(0, BLOCK_SPLITS)
    dim = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mass = tl.load(mass_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
    is_used = mass > float("-inf")
    weight = tl.exp2(mass - tl.max(mass, 0))
    offsets = (row * splits + split)[:, None] * D + dim[None, :]
    partial = tl.load(partial_ptr + offsets, mask=is_used[:, None] & (dim >= 0)[None, :], other=0.0)
    result = tl.sum(partial * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + ((start + token) * heads + head) * D + dim, to_element(result, ELEMENT, AMD))
