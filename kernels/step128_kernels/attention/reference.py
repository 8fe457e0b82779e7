"""Paged attention in plain torch, float32: what the kernels are held against, and what computes on a CPU."""

from __future__ import annotations

import torch

from step128_kernels.attention.page_order import read_pages, write_tokens

_LARGEST = 448.0


def update_kv_cache_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """Store K and V of new tokens; arguments as for :func:`step128_kernels.attention.update_kv_cache`."""
    used = slots >= 0
    slots = slots[used]
    rows = torch.nonzero(used).squeeze(1)
    write_tokens(kv_cache, slots, _stored(key[rows], kv_cache, k_scale), _stored(value[rows], kv_cache, v_scale))


def _stored(x: torch.Tensor, kv_cache: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if kv_cache.dtype != torch.float8_e4m3fn:
        return x.to(kv_cache.dtype)
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)


def paged_attention_reference(
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
    out: torch.Tensor,
) -> None:
    """Attention of a batch, one sequence after the other; arguments as for
    :func:`step128_kernels.attention.paged_attention`.
    """
    kv_heads, page = kv_cache.shape[1:3]
    ratio = query.shape[1] // kv_heads
    is_fp8 = kv_cache.dtype == torch.float8_e4m3fn
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for i, context in enumerate(lengths):
        start, end = starts[i], starts[i + 1]
        if end == start:
            continue
        position = torch.arange(context - (end - start), context, device=query.device)
        first = max(0, int(position[0]) - window + 1) if window else 0
        blocks = block_table[i, first // page : -(-context // page)].long()
        key_number = torch.arange(first // page * page, context, device=query.device)
        stored = read_pages(kv_cache, blocks)
        k, v = (x[:, : key_number.shape[0]].float() for x in stored)
        if is_fp8:
            k, v = k * k_scale, v * v_scale
        sees = key_number[None, :] <= position[:, None]
        if window:
            sees &= key_number[None, :] > position[:, None] - window
        # What no query sees may be anything, and 0 * NaN is NaN.
        v = v.where(sees.any(0)[None, :, None], torch.zeros((), device=v.device))
        q = query[start:end].float().transpose(0, 1)
        scores = q @ k.repeat_interleave(ratio, 0).transpose(1, 2) * scale
        probabilities = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        out[start:end] = (probabilities @ v.repeat_interleave(ratio, 0)).transpose(0, 1).to(out.dtype)
