"""Calls of the attention kernels on a made-up paged cache, each with a float32 reference, to compare and to time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from step128_kernels.attention.launches import decode_launches, prefill_launches, target_of
from step128_kernels.attention.limits import MOST_DECODE_TOKENS, scratch_elements
from step128_kernels.attention.reference import paged_attention_reference
from step128_kernels.attention.shape import AttentionCall, AttentionShape
from step128_kernels.device import gpu_identity
from step128_kernels.nl4_arguments import DTYPES
from step128_kernels.run_launch import run

Call = Callable[[], torch.Tensor]

_SEED = 128
K_SCALE, V_SCALE = 0.02, 0.03
ROUNDINGS = 3
"""For :func:`step128_kernels.testing.compare`: queries or K and V, probabilities, the output."""


@dataclass(frozen=True)
class Inputs:
    """One layer's tensors for a batch, pages in random order."""

    query: torch.Tensor
    cache: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor


def made_up_inputs(call: AttentionCall, device: torch.device) -> Inputs:
    """Random queries over :func:`made_up_cache`, all sequences as long as the longest."""
    shape = call.shape
    generator = torch.Generator(device).manual_seed(_SEED)
    rows = call.sequences * call.query_tokens
    query = torch.empty(rows, shape.heads, shape.head_dim, dtype=DTYPES[shape.element], device=device)
    cache, table = made_up_cache(shape, call.sequences, call.context_tokens, device)
    return Inputs(
        query.normal_(generator=generator),
        cache,
        table,
        torch.full((call.sequences,), call.context_tokens, dtype=torch.int32, device=device),
        torch.arange(0, rows + 1, call.query_tokens, dtype=torch.int32, device=device),
        torch.tensor(K_SCALE, device=device),
        torch.tensor(V_SCALE, device=device),
    )


@lru_cache(maxsize=1)  # gigabytes; the same for any number of query tokens and any config
def made_up_cache(
    shape: AttentionShape, sequences: int, context_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random cache, in page order as any bytes are, with no NaN among them, and the page table.

    Args:
        shape: the layer.
        sequences: of the batch.
        context_tokens: of every sequence.
        device: where.

    Returns:
        ``(cache, table)``: ``[blocks, kv_heads, page, 2 * head_dim]`` and int32 ``[sequences, pages]``.
    """
    generator = torch.Generator(device).manual_seed(_SEED)
    pages = -(-context_tokens // shape.page)
    size = sequences * pages, shape.kv_heads, shape.page, 2 * shape.head_dim
    if shape.kv_dtype == "fp8":
        code = torch.empty(size, dtype=torch.uint8, device=device).random_(generator=generator)
        cache = torch.where((code & 0x7F) == 0x7F, 0, code).to(torch.uint8).view(torch.float8_e4m3fn)
    else:
        cache = torch.empty(size, dtype=DTYPES[shape.kv_dtype], device=device).normal_(generator=generator)
    order = torch.randperm(size[0], generator=generator, device=device, dtype=torch.int32)
    return cache, order.view(sequences, pages)


def attention_runner(call: AttentionCall, config: Mapping[str, int | str], device: str = "cuda") -> tuple[Call, Call]:
    """The call with a config, and the reference's.

    Args:
        call: what is asked for.
        config: of the call's phase.
        device: "cuda" for any GPU; "cpu" under Triton's interpreter, for tiny sizes.

    Returns:
        ``(kernel, reference)``, each giving ``[sequences * query_tokens, heads, head_dim]``, the reference's in
        float32.
    """
    place = place_of(device)
    inputs, shape = made_up_inputs(call, place), call.shape
    make = prefill_launches if call.query_tokens > MOST_DECODE_TOKENS else decode_launches
    launches = [
        replace(
            one,
            scalars={**one.scalars, "table_stride": inputs.table.stride(0)} if "scale" in one.scalars else one.scalars,
        )
        for one in make(call, config, target_of(gpu_identity(place)[1]))
    ]
    out = torch.empty_like(inputs.query)
    scratch = torch.empty(scratch_elements(shape.heads, shape.head_dim), dtype=torch.float32, device=place)
    fp8 = shape.kv_dtype == "fp8"
    tensors = {
        "query_ptr": inputs.query.view(torch.int32) if fp8 else inputs.query,
        "cache_ptr": inputs.cache.view(torch.int16) if fp8 else inputs.cache,
        "table_ptr": inputs.table,
        "lengths_ptr": inputs.lengths,
        "starts_ptr": inputs.starts,
        "k_scale_ptr": inputs.k_scale,
        "v_scale_ptr": inputs.v_scale,
        "out_ptr": out,
        "partial_ptr": scratch,
        "mass_ptr": scratch[scratch.numel() // (shape.head_dim + 1) * shape.head_dim :],
    }

    def kernel() -> torch.Tensor:
        for launch in launches:
            run(launch, {name: tensors[name] for name in launch.pointers})
        return out

    return kernel, lambda: reference_result(call, inputs)


def reference_result(call: AttentionCall, inputs: Inputs) -> torch.Tensor:
    """float32 ``[sequences * query_tokens, heads, head_dim]``, one KV head at a time: a deep cache in float32 would not
    fit beside itself.
    """
    shape, query = call.shape, inputs.query
    right = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    for head in range(shape.kv_heads):
        group = slice(head * shape.gqa_ratio, (head + 1) * shape.gqa_ratio)
        paged_attention_reference(
            query[:, group],
            inputs.cache[:, head : head + 1],
            inputs.table,
            inputs.lengths,
            inputs.starts,
            scale=shape.head_dim**-0.5,
            window=shape.window,
            k_scale=inputs.k_scale,
            v_scale=inputs.v_scale,
            out=right[:, group],
        )
    return right


def place_of(device: str) -> torch.device:
    """A device with its number, so that equal devices are equal keys."""
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
