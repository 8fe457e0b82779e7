"""vLLM's paged attention on this machine's GPU: calls to time, on the keys and values that ours gets.

What is launched, and with what, is as in :mod:`~step128_kernels.vllm_plugin.attention_baselines`. The cache holds what
ours holds (:mod:`step128_kernels.attention.runner`), in vLLM's order within a page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch

from step128_kernels.attention.page_order import read_pages
from step128_kernels.attention.runner import Inputs, made_up_cache, made_up_inputs, place_of, reference_result
from step128_kernels.attention.shape import AttentionCall, AttentionShape
from step128_kernels.device import gpu_identity
from step128_kernels.launch import Launch
from step128_kernels.run_launch import run
from step128_kernels.vllm_plugin.attention_baselines import OPPONENTS, attention_baseline_case

Call = Callable[[], torch.Tensor]

_PAGES_AT_A_TIME = 4096
# What the two kernels and their sums call their arguments.
_NAMES = {
    "query": ("query_ptr", "Q"),
    "key": ("key_cache_ptr", "K"),
    "value": ("value_cache_ptr", "V"),
    "table": ("block_tables_ptr", "TABLE"),
    "lengths": ("seq_lens_ptr", "rswa_prefix_lens_ptr", "LENS"),
    "starts": ("query_start_len_ptr", "STARTS"),
    "k_scale": ("k_scale", "KS"),
    "v_scale": ("v_scale", "VS"),
    "out": ("output_ptr", "OUT"),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}


def find_kernels() -> None:
    """Import everything that is taken from vLLM.

    Raises:
        ImportError, AttributeError: this vLLM keeps its kernels elsewhere.
    """
    from vllm.v1.attention.ops import segmented_attention as segmented
    from vllm.v1.attention.ops import triton_unified_attention as unified
    from vllm.v1.kv_cache_interface import KVQuantMode

    for module, names in (
        (unified, ("unified_attention", "kernel_unified_attention", "reduce_segments")),
        (segmented, ("select_segmented_config", "_segmented_attention_stage", "_segmented_attention_reduce")),
        (KVQuantMode, ("FP8_PER_TENSOR",)),
    ):
        for name in names:
            getattr(module, name)


def opponents_here(call: AttentionCall, device: str = "cuda") -> tuple[str, ...]:
    """Kernels of vLLM that serve a call on this machine.

    Of AMD's GPUs only gfx12 gets the segmented one for an FP8 cache. On a GPU that is not AMD's vLLM would take another
    kernel than both; they are run all the same.
    """
    arch = gpu_identity(torch.device(device))[1]
    refused = call.shape.kv_dtype == "fp8" and arch.startswith("gfx11")
    return tuple(name for name in OPPONENTS if name != "vllm_segmented" or not refused)


def attention_baseline_runner(name: str, call: AttentionCall, device: str = "cuda") -> tuple[Call, Call]:
    """The call of one of vLLM's kernels, and the reference's.

    Args:
        name: one of :data:`step128_kernels.vllm_plugin.attention_baselines.OPPONENTS`.
        call: what is asked for.
        device: "cuda" for any GPU; "cpu" under Triton's interpreter, for tiny sizes.

    Returns:
        ``(kernel, reference)``, each giving ``[sequences * query_tokens, heads, head_dim]``, the reference's in
        float32.
    """
    place = place_of(device)
    inputs = made_up_inputs(call, place)
    launches = attention_baseline_case(name, call, gpu_identity(place)[1]).launches
    tensors = _tensors(call, inputs, launches)

    def kernel() -> torch.Tensor:
        for launch in launches:
            run(launch, {pointer: tensors[pointer] for pointer in launch.pointers})
        return tensors["out"]

    return kernel, lambda: reference_result(call, inputs)


def _tensors(call: AttentionCall, inputs: Inputs, launches: tuple[Launch, ...]) -> Mapping[str, torch.Tensor]:
    """By the kernels' own names, and the result as "out"."""
    place, head_dim = inputs.query.device, call.shape.head_dim
    pool = _in_vllms_order(call.shape, call.sequences, call.context_tokens, place)
    roles = {
        "query": inputs.query,
        "key": pool[..., :head_dim],
        "value": pool[..., head_dim:],
        "table": inputs.table,
        "lengths": inputs.lengths,
        "starts": inputs.starts,
        "k_scale": inputs.k_scale,
        "v_scale": inputs.v_scale,
        "out": torch.empty_like(inputs.query),
    }
    tensors = {"out": roles["out"]}
    for name, pointer in (one for launch in launches for one in launch.pointers.items()):
        if name in _ROLES:
            tensors[name] = roles[_ROLES[name]]
        elif pointer.dtype != "fp32":  # no parts: the segmented kernel gets the result in their place
            tensors[name] = roles["out"]
        elif name not in tensors:
            tensors[name] = torch.empty(pointer.size_bytes // 4, dtype=torch.float32, device=place)
    return tensors


@lru_cache(maxsize=1)
def _in_vllms_order(shape: AttentionShape, sequences: int, context_tokens: int, device: torch.device) -> torch.Tensor:
    """The made-up cache as vLLM's kernels take it: ``[blocks, page, kv_heads, 2 * head_dim]``, where pages of one head
    lie together, as in vLLM's pool.
    """
    cache, _ = made_up_cache(shape, sequences, context_tokens, device)
    # As bytes: torch cannot do everything with float8.
    raw = cache if cache.element_size() > 1 else cache.view(torch.uint8)
    pool = torch.empty_like(raw)
    blocks, kv_heads, page, width = raw.shape
    for first in range(0, blocks, _PAGES_AT_A_TIME):
        some = torch.arange(first, min(first + _PAGES_AT_A_TIME, blocks), device=device)
        for part, half in zip(read_pages(raw, some), (slice(width // 2), slice(width // 2, width)), strict=True):
            pool[some, ..., half] = part.view(kv_heads, len(some), page, width // 2).transpose(0, 1)
    return pool.view(cache.dtype).transpose(1, 2)
