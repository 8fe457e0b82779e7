"""Paged attention over vLLM's KV cache. Callers use what stands here; triton is imported only where a GPU computes.

The order of K and V within a page is ours (:mod:`.page_order`), so what :func:`update_kv_cache` wrote only
:func:`paged_attention` can read.
"""

from __future__ import annotations

import torch

from step128_kernels.attention.limits import MOST_DECODE_TOKENS, MOST_SPLIT_ROWS, scratch_elements
from step128_kernels.attention.reference import paged_attention_reference, update_kv_cache_reference

__all__ = ["MOST_DECODE_TOKENS", "MOST_SPLIT_ROWS", "paged_attention", "scratch_elements", "update_kv_cache"]


def update_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """Store K and V of new tokens.

    Args:
        key, value: ``[tokens, kv_heads, head_dim]``; rows beyond the slots are not looked at.
        kv_cache: ``[blocks, kv_heads, page, 2 * head_dim]``, vLLM's logical shape, each page of a head contiguous;
            float8_e4m3fn, or the type of K and V.
        slots: int64 ``[n]``, block times page plus place in the page; negative: padding, skipped.
        k_scale, v_scale: float32 scalars, for FP8 only: ``x / scale`` is stored, clamped to +-448, rounded to nearest
            even.

    Raises:
        ValueError: a page of one head is not contiguous.
    """
    if key.is_cuda:
        from step128_kernels.attention.triton_attention import update_kv_cache_triton

        return update_kv_cache_triton(key, value, kv_cache, slots, k_scale, v_scale)
    return update_kv_cache_reference(key, value, kv_cache, slots, k_scale, v_scale)


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    *,
    scale: float,
    window: int,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    max_query_tokens: int,
    max_context_tokens: int,
    out: torch.Tensor,
    scratch: torch.Tensor | None = None,
) -> None:
    """Causal attention of a batch of sequences over their pages.

    Args:
        query: ``[tokens, heads, head_dim]``, the sequences' new tokens one sequence after the other.
        kv_cache: as for :func:`update_kv_cache`, the new tokens stored already.
        block_table: int32 ``[sequences, pages]``, blocks of each sequence.
        seq_lens: int32 ``[sequences]``, tokens of each sequence, the new ones included.
        query_start: int32 ``[sequences + 1]``, first row of each sequence in ``query``, and the end. A sequence may
            have none.
        scale: of the scores.
        window: a query at position p sees keys p - window < k <= p; 0: all k <= p.
        k_scale, v_scale: float32 scalars, for FP8 only.
        max_query_tokens: at least the most new tokens of a sequence.
        max_context_tokens: at least the most tokens of a sequence; it picks the config, no more.
        out: ``[tokens, heads, head_dim]``, written; rows of no sequence are left alone.
        scratch: float32, ``scratch_elements(heads, head_dim)`` or more; allocated if None. Not used on a CPU.

    Raises:
        ValueError: the heads, head size or page size are none that the kernels serve, or a tensor is not laid out so.
    """
    if query.is_cuda:
        from step128_kernels.attention.triton_attention import paged_attention_triton

        paged_attention_triton(
            query,
            kv_cache,
            block_table,
            seq_lens,
            query_start,
            scale=scale,
            window=window,
            k_scale=k_scale,
            v_scale=v_scale,
            max_query_tokens=max_query_tokens,
            max_context_tokens=max_context_tokens,
            out=out,
            scratch=scratch,
        )
        return
    paged_attention_reference(
        query,
        kv_cache,
        block_table,
        seq_lens,
        query_start,
        scale=scale,
        window=window,
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
    )
