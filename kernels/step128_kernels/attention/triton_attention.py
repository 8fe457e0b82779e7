"""Paged attention on a GPU: picks the configs and carries out the launches, without ever waiting for the device."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from step128_kernels.attention.configs import choose
from step128_kernels.attention.launches import (
    decode_launches,
    decode_tokens,
    prefill_launches,
    target_of,
    update_launch,
)
from step128_kernels.attention.limits import MOST_DECODE_TOKENS, scratch_elements
from step128_kernels.attention.shape import AttentionCall, AttentionShape
from step128_kernels.device import gpu_identity
from step128_kernels.launch import Launch
from step128_kernels.nl4_arguments import ELEMENTS
from step128_kernels.run_launch import run

_WORD_BYTES = 2


def call_launches(call: AttentionCall, device: torch.device) -> tuple[Launch, ...]:
    """What a call launches on a device: for sequences of few query tokens, then, if there may be any, for the others.

    A batch may hold sequences of both kinds; each kernel passes over the other's.
    """
    shape, target = call.shape, target_of(gpu_identity(device)[1])
    few = replace(call, query_tokens=decode_tokens(call))
    config = choose(shape, few.sequences, few.query_tokens, few.context_tokens, device)
    launches = decode_launches(few, config, target)
    if call.query_tokens > MOST_DECODE_TOKENS:
        config = choose(shape, call.sequences, call.query_tokens, call.context_tokens, device)
        launches += prefill_launches(call, config, target)
    return launches


@lru_cache(maxsize=4096)
def _call_launches(
    call: AttentionCall, scalars: tuple[tuple[str, int | float], ...], device: torch.device
) -> tuple[Launch, ...]:
    own = dict(scalars)
    return tuple(
        replace(launch, scalars={name: own.get(name, value) for name, value in launch.scalars.items()})
        for launch in call_launches(call, device)
    )


@lru_cache(maxsize=1024)
def _update_launch(tokens: int, shape: AttentionShape, scalars: tuple[tuple[str, int], ...]) -> Launch:
    launch = update_launch(tokens, shape)
    return replace(launch, scalars=dict(launch.scalars) | dict(scalars))


def update_kv_cache_triton(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """Store K and V of new tokens; arguments as for :func:`step128_kernels.attention.update_kv_cache`."""
    if not slots.numel():
        return
    heads, head_dim = key.shape[1:]
    shape = _shape(heads, kv_cache, head_dim, 0, ELEMENTS[key.dtype])
    strides = {
        "key_stride": _rows_apart(key, "key"),
        "value_stride": _rows_apart(value, "value"),
        "block_stride": kv_cache.stride(0),
        "head_stride": kv_cache.stride(1),
    }
    launch = _update_launch(slots.shape[0], shape, tuple(strides.items()))
    cache = kv_cache.view(torch.uint8) if kv_cache.element_size() == 1 else kv_cache
    tensors = {"key_ptr": key, "value_ptr": value, "cache_ptr": cache, "slots_ptr": slots}
    run(launch, tensors | {"k_scale_ptr": k_scale, "v_scale_ptr": v_scale})


def paged_attention_triton(
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
    """Attention of a batch; arguments as for :func:`step128_kernels.attention.paged_attention`."""
    if not query.shape[0] or not seq_lens.shape[0]:
        return
    heads, head_dim = query.shape[1:]
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous; its strides are {out.stride()}")
    shape = _shape(heads, kv_cache, head_dim, window, ELEMENTS[query.dtype])
    # Contexts are rounded up to a power of two: which config serves hardly depends on more, and few launches are made.
    context = 1 << (max_context_tokens - 1).bit_length()
    call = AttentionCall(shape, seq_lens.shape[0], max_query_tokens, context)
    is_fp8 = shape.kv_dtype == "fp8"
    words = kv_cache.element_size() / _WORD_BYTES
    scalars = {
        "scale": scale,
        "query_stride": _rows_apart(query, "query") // (2 if is_fp8 else 1),
        "block_stride": int(kv_cache.stride(0) * words),
        "head_stride": int(kv_cache.stride(1) * words),
        "table_stride": block_table.stride(0),
    }
    launches = _call_launches(call, tuple(scalars.items()), query.device)
    if scratch is None:
        scratch = torch.empty(scratch_elements(heads, head_dim), dtype=torch.float32, device=query.device)
    tensors = {
        "query_ptr": query.view(torch.int32) if is_fp8 else query,
        "cache_ptr": kv_cache.view(torch.int16) if is_fp8 else kv_cache,
        "table_ptr": block_table,
        "lengths_ptr": seq_lens,
        "starts_ptr": query_start,
        "k_scale_ptr": k_scale,
        "v_scale_ptr": v_scale,
        "out_ptr": out,
        "partial_ptr": scratch,
        # Behind the largest partial results, so that their place does not depend on the launch.
        "mass_ptr": scratch[scratch_elements(heads, head_dim) // (head_dim + 1) * head_dim :],
    }
    for launch in launches:
        run(launch, {name: tensors[name] for name in launch.pointers})


def _shape(heads: int, kv_cache: torch.Tensor, head_dim: int, window: int, element: str) -> AttentionShape:
    """The shape of a call, from its tensors.

    Raises:
        ValueError: the cache is not one of vLLM's for these heads, or a page of one head is not contiguous.
    """
    kv_heads, page, width = kv_cache.shape[1:]
    if width != 2 * head_dim or kv_cache.stride(3) != 1 or kv_cache.stride(2) != width:
        raise ValueError(
            f"a KV cache [blocks, kv_heads, page, {2 * head_dim}] with contiguous pages is needed; this one is "
            f"{tuple(kv_cache.shape)} with strides {kv_cache.stride()}"
        )
    kv_dtype = "fp8" if kv_cache.element_size() == 1 else ELEMENTS[kv_cache.dtype]
    return AttentionShape(heads, kv_heads, head_dim, window, page, kv_dtype, element)


def _rows_apart(x: torch.Tensor, name: str) -> int:
    """Elements from one token to the next.

    Raises:
        ValueError: the heads of a token do not lie one behind the other.
    """
    if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        raise ValueError(f"{name} {tuple(x.shape)} must have contiguous tokens; its strides are {x.stride()}")
    return x.stride(0)
