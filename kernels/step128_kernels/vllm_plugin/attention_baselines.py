"""vLLM's own paged attention as cases to compile and to count: what ours is compared with.

* ``vllm_unified``: TRITON_ATTN, ``kernel_unified_attention``. One query token: 16 segments and a reduction; more, as in
  MTP's verification: one work-group a block of queries, with no split of the keys.
* ``vllm_segmented``: ROCM_SEGMENTED_ATTN, which vLLM does not choose by itself. On gfx11 it refuses an FP8 cache.

Block sizes, grids and arguments are those of vLLM's launch code, run with tensors that have no memory
(:mod:`~step128_kernels.vllm_plugin.baselines_source`), for a cache of pages in vLLM's order.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from step128_kernels.attention.shape import AttentionCall
from step128_kernels.launch import KernelCase
from step128_kernels.nl4_arguments import DTYPES
from step128_kernels.vllm_plugin.baselines_source import Platform, Recorder, as_triton, relinked

OPPONENTS = ("vllm_unified", "vllm_segmented")
_SEGMENTS = 16  # NUM_PAR_SOFTMAX_SEGMENTS of vllm/v1/attention/backends/triton_attn.py
_SEGMENTED_SEQUENCES = 128  # MIN_LAUNCH_GRID_SIZE_2D there, over the KV heads
_META = torch.device("meta")


class _AttentionPlatform(Platform):
    """What the launch code of attention asks besides."""

    def fp8_dtype(self) -> torch.dtype:
        """Type of FP8 queries, which the calls here do not have."""
        return torch.float8_e4m3fn

    def is_device_capability_family(self, family: int) -> bool:
        """A kind of NVIDIA GPU: no."""
        return False


def attention_baseline_case(name: str, call: AttentionCall, arch: str) -> KernelCase:
    """All launches of one call.

    Args:
        name: one of OPPONENTS.
        call: what is asked for; all sequences are as long as the longest.
        arch: "gfx1201" or "gfx1151".
    """
    shape = call.shape
    tensors = _tensors(call)
    starts = tuple(call.query_tokens * i for i in range(call.sequences + 1))
    loads: dict[str, int | tuple[int, ...]] = {"table": 0, "lengths": call.context_tokens, "starts": starts}
    record = _segmented if name == "vllm_segmented" else _unified
    launches = tuple(launch for one in record(call, arch, tensors, loads) for launch in one.launches)
    sizes = {key: value for key, value in launches[0].constants.items() if key in ("TILE_SIZE", "BLOCK_M", "BM", "BN")}
    return KernelCase(
        kernel=name,
        phase="decode" if call.query_tokens <= 8 else "prefill",
        arch=arch,
        shape={"q_len": call.query_tokens, "batch": call.sequences, "context": call.context_tokens, "W": shape.window},
        config={**sizes, "num_warps": launches[0].num_warps, "num_stages": launches[0].num_stages},
        launches=launches,
        weights=call.kv_bytes,
        memory_bytes=call.kv_bytes,
        unit="KV byte",
    )


def _tensors(call: AttentionCall) -> dict[str, torch.Tensor]:
    shape = call.shape
    rows, dtype = call.sequences * call.query_tokens, DTYPES[shape.element]
    pages = -(-call.context_tokens // shape.page)
    kv_dtype = torch.float8_e4m3fn if shape.kv_dtype == "fp8" else dtype
    pool = torch.empty(
        max(pages, 1 << 17), shape.kv_heads, shape.page, 2 * shape.head_dim, dtype=kv_dtype, device=_META
    ).transpose(1, 2)
    return {
        "q": torch.empty(rows, shape.heads, shape.head_dim, dtype=dtype, device=_META),
        "out": torch.empty(rows, shape.heads, shape.head_dim, dtype=dtype, device=_META),
        "k": pool[..., : shape.head_dim],
        "v": pool[..., shape.head_dim :],
        "table": torch.empty(call.sequences, pages, dtype=torch.int32, device=_META),
        "lengths": torch.empty(call.sequences, dtype=torch.int32, device=_META),
        "starts": torch.empty(call.sequences + 1, dtype=torch.int32, device=_META),
        "scale": torch.empty((), dtype=torch.float32, device=_META),
    }


def _unified(
    call: AttentionCall, arch: str, tensors: dict[str, torch.Tensor], loads: dict[str, Any]
) -> tuple[Recorder, ...]:
    from vllm.v1.attention.ops import triton_unified_attention as unified
    from vllm.v1.kv_cache_interface import KVQuantMode

    shape = call.shape
    own = {"seq_lens_ptr": loads["lengths"], "query_start_len_ptr": loads["starts"]}
    extra = {"block_tables_ptr": loads["table"], "rswa_prefix_lens_ptr": loads["lengths"]}
    stage = Recorder("vllm_unified", as_triton(unified.kernel_unified_attention), own | extra)
    reduce = Recorder("vllm_reduce_segments", as_triton(unified.reduce_segments), own)
    platform = _AttentionPlatform(arch)
    launch = relinked(unified.unified_attention, platform, kernel_unified_attention=stage, reduce_segments=reduce)
    rows = call.sequences * call.query_tokens
    partial = torch.empty(rows, shape.heads, _SEGMENTS, shape.head_dim, dtype=torch.float32, device=_META)
    sums = torch.empty(rows, shape.heads, _SEGMENTS, dtype=torch.float32, device=_META)
    launch(
        q=tensors["q"],
        k=tensors["k"],
        v=tensors["v"],
        out=tensors["out"],
        cu_seqlens_q=tensors["starts"],
        max_seqlen_q=call.query_tokens,
        seqused_k=tensors["lengths"],
        max_seqlen_k=call.context_tokens,
        softmax_scale=shape.head_dim**-0.5,
        causal=True,
        window_size=(shape.window - 1, 0) if shape.window else (-1, -1),
        block_table=tensors["table"],
        softcap=0,
        q_descale=None,
        k_descale=tensors["scale"],
        v_descale=tensors["scale"],
        seq_threshold_3D=_SEGMENTED_SEQUENCES // shape.kv_heads,
        num_par_softmax_segments=_SEGMENTS,
        softmax_segm_output=partial,
        softmax_segm_max=sums,
        softmax_segm_expsum=sums,
        kv_quant_mode=KVQuantMode.FP8_PER_TENSOR if shape.kv_dtype == "fp8" else KVQuantMode.NONE,
    )
    return stage, reduce


def _segmented(
    call: AttentionCall, arch: str, tensors: dict[str, torch.Tensor], loads: dict[str, Any]
) -> tuple[Recorder, ...]:
    from vllm.v1.attention.ops import segmented_attention as segmented

    shape = call.shape
    own = {"TABLE": loads["table"], "STARTS": loads["starts"], "LENS": loads["lengths"]}
    stage = Recorder("vllm_segmented", as_triton(segmented._segmented_attention_stage), own)
    reduce = Recorder(
        "vllm_segmented_reduce", as_triton(segmented._segmented_attention_reduce), {"STARTS": own["STARTS"]}
    )
    platform = _AttentionPlatform(arch)
    launch = relinked(
        segmented._launch_segmented_attention,
        platform,
        _segmented_attention_stage=stage,
        _segmented_attention_reduce=reduce,
    )
    span = min(call.context_tokens, shape.window - 1 + call.query_tokens) if shape.window else call.context_tokens
    config = relinked(inspect.unwrap(segmented.select_segmented_config), platform)(
        call.sequences, call.query_tokens, span, shape.heads, shape.kv_heads, shape.head_dim, shape.kv_dtype == "fp8"
    )
    capacity = segmented.segmented_query_capacity(call.query_tokens)
    shapes = segmented.segmented_workspace_shapes(
        call.sequences, capacity, shape.heads, shape.kv_heads, shape.head_dim, config["splits"]
    )
    partial, sums = (
        (torch.empty(one, dtype=torch.float32, device=_META) for one in shapes)
        if shapes is not None
        else (tensors["out"], tensors["out"])
    )
    launch(
        tensors["q"],
        tensors["out"],
        tensors["k"],
        tensors["v"],
        tensors["table"],
        tensors["starts"],
        tensors["lengths"],
        tensors["scale"],
        tensors["scale"],
        None,
        shape.head_dim**-0.5,
        config,
        partial,
        sums,
        capacity,
        shape.window - 1 if shape.window else -1,
        True,
        compile_only=False,
    )
    return stage, reduce
