"""Writes the K and V of new tokens into their pages, in page order (:mod:`.page_order`)."""

from __future__ import annotations

import triton
import triton.language as tl

from step128_kernels.attention.fp8 import float_to_byte


@triton.jit(do_not_specialize=["key_stride", "value_stride"])
def cache_update_kernel(
    key_ptr,
    value_ptr,
    cache_ptr,
    slots_ptr,
    k_scale_ptr,
    v_scale_ptr,
    key_stride,
    value_stride,
    block_stride,
    head_stride,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    FP8: tl.constexpr,
):
    """K and V of one token and KV head. Grid: tokens, KV heads.

    Args:
        key_ptr, value_ptr: ``[tokens, kv_heads, D]``, ``key_stride`` and ``value_stride`` elements a token.
        cache_ptr: bytes (uint8) for FP8, else the type of K and V.
        slots_ptr: int64, page * PAGE + place in the page; negative: padding, not written.
        k_scale_ptr, v_scale_ptr: float32 scalars; not read without FP8.
        block_stride, head_stride: of the cache, in its elements.
    """
    token = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    dim = tl.arange(0, D)
    key = tl.load(key_ptr + token.to(tl.int64) * key_stride + head * D + dim)
    value = tl.load(value_ptr + token.to(tl.int64) * value_stride + head * D + dim)
    place = (slot % PAGE).to(tl.int32)
    row = place % 16
    granule_ptr = cache_ptr + slot // PAGE * block_stride + head.to(tl.int64) * head_stride + place // 16 * (32 * D)
    if FP8:
        k_byte = float_to_byte(key.to(tl.float32) / tl.load(k_scale_ptr)).to(tl.uint8)
        v_byte = float_to_byte(value.to(tl.float32) / tl.load(v_scale_ptr)).to(tl.uint8)
        tl.store(granule_ptr + (dim // 16 * 16 + row) * 16 + dim % 16, k_byte)
        tl.store(granule_ptr + 16 * D + dim * 16 + 2 * (row % 8) + row // 8, v_byte)
    else:
        tl.store(granule_ptr + (dim // 8 * 16 + row) * 8 + dim % 8, key)
        tl.store(granule_ptr + 16 * D + dim * 16 + row, value)
