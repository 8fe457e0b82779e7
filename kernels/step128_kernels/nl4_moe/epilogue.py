"""What decode and prefill of the experts share: the clamped SwiGLU, and the sum over a token's experts."""

from __future__ import annotations

import triton
import triton.language as tl

from step128_kernels.nl4_moe.align import local_expert


@triton.jit
def clamped_swiglu(gate, up, LIMIT: tl.constexpr):
    """``silu(gate) * up``; with a limit ``min(silu(gate), limit) * clamp(up, -limit, limit)``, as Step-3.7 does."""
    gate = gate * tl.sigmoid(gate)
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate * up


@triton.jit
def nl4_moe_combine_kernel(
    partial_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    y_ptr,
    n,
    TOP_K: tl.constexpr,
    PADDED_TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_MAP: tl.constexpr,
):
    """``y [tokens, n]``: sum of ``partial [tokens * TOP_K, n]`` over each token's experts that live on this rank.

    A row of padding gives 0.

    Program (j, t): columns j * BLOCK_N and on of token t. Summed in float32, always in the same order.
    """
    token = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.arange(0, PADDED_TOP_K)
    local = slot < TOP_K
    expert = tl.load(topk_ids_ptr + token * TOP_K + slot, mask=local, other=-1)
    local = local_expert(expert, expert_map_ptr, HAS_MAP) >= 0
    mask = local[:, None] & (column < n)[None, :]
    place = (token * TOP_K + slot)[:, None] * n + column[None, :]
    parts = tl.load(partial_ptr + place, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(parts, axis=0)
    tl.store(y_ptr + token * n + column, total.to(y_ptr.dtype.element_ty), mask=column < n)
