"""How K and V lie in a page of the KV cache: the one truth of the order, in torch.

Page size and bytes are vLLM's; the order within a page is ours, made so that a lane of the kernels loads 16 bytes that
are its WMMA operand. A page of one KV head, ``2 * head_dim`` values a token, is cut into granules of 16 tokens, each
first K, then V:

* 16-bit values: K of token i, dimension d at ``(d // 8 * 16 + i) * 8 + d % 8``; V at ``16 * head_dim + d * 16 + i``.
* FP8: K at ``(d // 16 * 16 + i) * 16 + d % 16``; V at ``16 * head_dim + d * 16 + 2 * (i % 8) + i // 8``, so that a
  16-bit word holds the same dimension of tokens i and i + 8.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from step128_kernels.attention.shape import KEYS_PER_GRANULE


@lru_cache(maxsize=32)
def places(page: int, head_dim: int, fp8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of K and of V in a page of one head: int64 ``[page, head_dim]`` each, in elements.

    Args:
        page: tokens, a multiple of 16.
        head_dim: dimensions, a multiple of 16.
        fp8: one-byte values.
    """
    token, dim = torch.arange(page)[:, None], torch.arange(head_dim)[None, :]
    granule = token // KEYS_PER_GRANULE * (2 * KEYS_PER_GRANULE * head_dim)
    i = token % KEYS_PER_GRANULE
    run = 16 if fp8 else 8
    key = granule + (dim // run * KEYS_PER_GRANULE + i) * run + dim % run
    inside = 2 * (i % 8) + i // 8 if fp8 else i
    value = granule + KEYS_PER_GRANULE * head_dim + dim * KEYS_PER_GRANULE + inside
    return key, value


def flat_pages(kv_cache: torch.Tensor) -> torch.Tensor:
    """View a cache ``[blocks, kv_heads, page, 2 * head_dim]`` as ``[blocks, kv_heads, page * 2 * head_dim]``.

    Raises:
        ValueError: a page of one head is not contiguous.
    """
    _, _, page, width = kv_cache.shape
    if kv_cache.stride(3) != 1 or kv_cache.stride(2) != width:
        raise ValueError(f"pages of one head must be contiguous; this cache's strides are {kv_cache.stride()}")
    return kv_cache.as_strided(
        (*kv_cache.shape[:2], page * width), (kv_cache.stride(0), kv_cache.stride(1), 1), kv_cache.storage_offset()
    )


def read_pages(kv_cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of some pages, one behind the other.

    Args:
        kv_cache: ``[blocks, kv_heads, page, 2 * head_dim]``, float8_e4m3fn or a 16- or 32-bit float.
        blocks: int64 ``[n]``.

    Returns:
        Two tensors ``[kv_heads, n * page, head_dim]`` of the cache's type.
    """
    _, heads, page, width = kv_cache.shape
    k_places, v_places = places(page, width // 2, kv_cache.element_size() == 1)
    pages = flat_pages(kv_cache)[blocks].transpose(0, 1)
    read = (pages[..., where.reshape(-1).to(pages.device)] for where in (k_places, v_places))
    k, v = (part.reshape(heads, blocks.shape[0] * page, width // 2) for part in read)
    return k, v


def write_tokens(kv_cache: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Store tokens.

    Args:
        kv_cache: as for :func:`read_pages`.
        slots: int64 ``[n]``, page number times page size plus place in the page.
        key, value: ``[n, kv_heads, head_dim]`` of the cache's type.
    """
    _, heads, page, width = kv_cache.shape
    pages = flat_pages(kv_cache)
    if pages.element_size() == 1:  # torch writes to float8 through indices only as bytes
        pages, key, value = pages.view(torch.uint8), key.view(torch.uint8), value.view(torch.uint8)
    block = (slots // page)[:, None, None]
    head = torch.arange(heads, device=slots.device)[None, :, None]
    for where, x in zip(places(page, width // 2, pages.element_size() == 1), (key, value), strict=True):
        pages[block, head, where.to(slots.device)[slots % page][:, None, :]] = x
