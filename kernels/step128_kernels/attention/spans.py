"""Which keys a program reads: the same for the AMD kernel and its portable twin, so both cut the work alike.

Plain Triton on scalars; :mod:`~step128_kernels.attention.decode_rdna` takes it into Gluon as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_span(
    context, query_tokens, first_row, rows: tl.constexpr, GQA: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Tiles of BLOCK_N keys that rows ``first_row ..`` need, and which of them no row must mask.

    Row r of a KV head is query token ``r // GQA``, which stands at ``context - query_tokens + r // GQA``.

    Returns:
        ``first, full_first, full_last, last``: tiles ``first <= t < last`` are needed; every row sees every key of
        those with ``full_first <= t < full_last``.
    """
    first_position = context - query_tokens + first_row // GQA
    last_position = context - query_tokens + tl.minimum((first_row + rows - 1) // GQA, query_tokens - 1)
    last = last_position // BLOCK_N + 1
    full_last = (first_position + 1) // BLOCK_N
    if WINDOW > 0:
        first = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_N
        full_first = (tl.maximum(last_position - WINDOW + 1, 0) + BLOCK_N - 1) // BLOCK_N
    else:
        first = last_position * 0
        full_first = first
    return first, full_first, full_last, last


@triton.jit
def split_span(first, last, split, splits, least_tiles):
    """The part of tiles ``first .. last - 1`` that one of ``splits`` programs takes: ``begin, end``; empty if it has
    nothing to do, as every part but one has at least ``least_tiles``.
    """
    tiles = last - first
    used = tl.minimum(splits, (tiles + least_tiles - 1) // least_tiles)
    each = (tiles + used - 1) // used
    begin = first + split * each
    return begin, tl.minimum(begin + each, last)
