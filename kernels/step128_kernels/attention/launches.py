"""How attention is launched: the one place that turns a call and a config into kernel arguments.

The host wrapper runs what stands here, and the offline inspection compiles and counts it.
"""

from __future__ import annotations

from collections.abc import Mapping

from step128_kernels.attention.cache_update import cache_update_kernel
from step128_kernels.attention.decode_rdna import attention_decode_kernel
from step128_kernels.attention.limits import MOST_DECODE_TOKENS, MOST_SPLIT_ROWS
from step128_kernels.attention.paged import attention_paged_kernel
from step128_kernels.attention.prefill_rdna import attention_prefill_kernel
from step128_kernels.attention.reduce import attention_reduce_kernel
from step128_kernels.attention.shape import KV_BYTES, AttentionCall, AttentionShape
from step128_kernels.launch import Launch, Pointer
from step128_kernels.nl4_arguments import ELEMENT_BYTES, num_options

TARGETS = ("rdna4", "rdna3", "portable")
"""Which GPU's instructions: gfx12's, gfx11's, or only Triton's own."""

WAVE_ROWS = 16
_POOL_BYTES = 1 << 32
"""Size that the KV cache is compiled for: vLLM's pool. Triton addresses tensors under 2 GiB in another way."""
_REDUCE_BLOCK_D = 32
_REDUCE_WARP_ELEMENTS = 2048
_UPDATE_WARPS = 1


def target_of(arch: str) -> str:
    """The target of an AMD architecture such as "gfx1201"; "portable" for anything else."""
    return {"gfx12": "rdna4", "gfx11": "rdna3"}.get(arch[:5], "portable")


def decode_tokens(call: AttentionCall) -> int:
    """Query tokens of a sequence for which the decode launches are made."""
    return min(call.query_tokens, MOST_DECODE_TOKENS)


def used_splits(call: AttentionCall, splits: int) -> int:
    """Splits of a launch: those of the config, or as many as the scratch has room for."""
    return max(1, min(splits, MOST_SPLIT_ROWS // (call.sequences * decode_tokens(call))))


def wave_keys(shape: AttentionShape, wanted: int) -> int:
    """Keys of a tile of the one-wave kernel: a tile of more than 32 must lie in one page there."""
    return wanted if shape.page % wanted == 0 else 32


def _is_rdna(shape: AttentionShape, target: str) -> bool:
    """Whether the kernels for RDNA serve: queries and sums of 256 dimensions are more than a wave's registers."""
    return target != "portable" and shape.head_dim <= 128


def decode_launches(call: AttentionCall, config: Mapping[str, int | str], target: str) -> tuple[Launch, ...]:
    """Attention of all sequences of at most MOST_DECODE_TOKENS query tokens: the splits, then their sum if there are
    several.

    Args:
        call: what is asked for.
        config: a decode config.
        target: one of TARGETS.
    """
    shape, tokens = call.shape, decode_tokens(call)
    splits = used_splits(call, int(config["SPLITS"]))
    rows = call.sequences * tokens * shape.heads
    partial = {
        "partial_ptr": Pointer("fp32", 4 * rows * splits * shape.head_dim),
        "mass_ptr": Pointer("fp32", 4 * rows * splits),
    }
    rdna = _is_rdna(shape, target)
    block_n = int(config["BLOCK_N"])
    constants = _constants(shape, wave_keys(shape, block_n) if rdna else block_n) | {"DIRECT": splits == 1}
    scalars = {"splits": splits, "least_tiles": int(config["LEAST_TILES"]), "most_query_tokens": tokens}
    if rdna:
        constants |= {"RDNA4": target == "rdna4"}
    else:
        constants |= {"TARGET": target, "BLOCK_M": WAVE_ROWS}
        scalars |= {"least_query_tokens": 1}
    attention = Launch(
        name="attention_decode",
        function=attention_decode_kernel if rdna else attention_paged_kernel,
        pointers=_pointers(call) | partial,
        scalars=_strides(call) | scalars,
        constants=constants,
        grid=(-(-tokens * shape.gqa_ratio // WAVE_ROWS), shape.kv_heads * splits, call.sequences),
        **num_options(config),  # type: ignore[arg-type]
    )
    return (
        (attention,) if splits == 1 else (attention, _reduce_launch(call, partial, rows, splits, target != "portable"))
    )


def _reduce_launch(call: AttentionCall, partial: Mapping[str, Pointer], rows: int, splits: int, amd: bool) -> Launch:
    shape = call.shape
    block_splits = 1 << (splits - 1).bit_length()
    block_d = min(shape.head_dim, max(_REDUCE_BLOCK_D, _REDUCE_WARP_ELEMENTS // block_splits))
    warps = max(1, block_splits * block_d // _REDUCE_WARP_ELEMENTS)
    return Launch(
        name="attention_reduce",
        function=attention_reduce_kernel,
        pointers={**partial, **{name: _pointers(call)[name] for name in ("starts_ptr", "out_ptr")}},
        scalars={"splits": splits, "most_query_tokens": decode_tokens(call), "heads": shape.heads},
        constants={
            "D": shape.head_dim,
            "BLOCK_D": block_d,
            "BLOCK_SPLITS": block_splits,
            "ELEMENT": shape.element,
            "AMD": amd,
        },
        grid=(rows, shape.head_dim // block_d, 1),
        num_warps=min(8, warps),
    )


def prefill_launches(call: AttentionCall, config: Mapping[str, int | str], target: str) -> tuple[Launch, ...]:
    """Attention of all sequences of more than MOST_DECODE_TOKENS query tokens.

    Args:
        call: what is asked for.
        config: a prefill config.
        target: one of TARGETS.
    """
    shape, block_m, num_warps = call.shape, int(config["BLOCK_M"]), int(config["num_warps"])
    constants = _constants(shape, int(config["BLOCK_N"]))
    pointers = _pointers(call)
    scalars = _strides(call) | {"least_query_tokens": MOST_DECODE_TOKENS + 1}
    rdna = _is_rdna(shape, target)
    if rdna:
        if num_warps not in (4, 8) or block_m != WAVE_ROWS * num_warps:
            raise ValueError(f"a prefill config needs BLOCK_M = 16 x num_warps of 4 or 8; it is {dict(config)}")
        constants |= {"RDNA4": target == "rdna4", "WARPS": num_warps}
    else:
        constants |= {"DIRECT": True, "TARGET": target, "BLOCK_M": block_m}
        scalars |= {"splits": 1, "least_tiles": 1, "most_query_tokens": call.query_tokens}
        pointers |= {"partial_ptr": Pointer("fp32", 16), "mass_ptr": Pointer("fp32", 16)}  # not used
    return (
        Launch(
            name="attention_prefill",
            function=attention_prefill_kernel if rdna else attention_paged_kernel,
            pointers=pointers,
            scalars=scalars,
            constants=constants,
            grid=(-(-call.query_tokens * shape.gqa_ratio // block_m), shape.kv_heads, call.sequences),
            **num_options(config),  # type: ignore[arg-type]
        ),
    )


def update_launch(tokens: int, shape: AttentionShape) -> Launch:
    """Storing K and V of new tokens.

    Args:
        tokens: at least 1; slots, of which some may be padding.
        shape: of the layer.
    """
    fp8 = shape.kv_dtype == "fp8"
    row = shape.kv_heads * shape.head_dim
    given = Pointer(shape.element, tokens * row * ELEMENT_BYTES[shape.element])
    page = shape.page * 2 * shape.head_dim
    return Launch(
        name="attention_cache_update",
        function=cache_update_kernel,
        pointers={
            "key_ptr": given,
            "value_ptr": given,
            "cache_ptr": Pointer("u8" if fp8 else shape.kv_dtype, _POOL_BYTES),
            "slots_ptr": Pointer("i64", 8 * tokens),
            "k_scale_ptr": Pointer("fp32", 4),
            "v_scale_ptr": Pointer("fp32", 4),
        },
        scalars={"key_stride": row, "value_stride": row, "block_stride": page * shape.kv_heads, "head_stride": page},
        constants={"D": shape.head_dim, "PAGE": shape.page, "FP8": fp8},
        grid=(tokens, shape.kv_heads, 1),
        num_warps=_UPDATE_WARPS,
    )


def _constants(shape: AttentionShape, block_n: int) -> dict[str, object]:
    return {
        "GQA": shape.gqa_ratio,
        "D": shape.head_dim,
        "PAGE": shape.page,
        "WINDOW": shape.window,
        "BLOCK_N": block_n,
        "FP8": shape.kv_dtype == "fp8",
        "ELEMENT": shape.element,
    }


def _pointers(call: AttentionCall) -> dict[str, Pointer]:
    shape = call.shape
    tokens = call.sequences * call.query_tokens
    size_bytes = tokens * shape.heads * shape.head_dim * ELEMENT_BYTES[shape.element]
    return {
        "query_ptr": Pointer("i32" if shape.kv_dtype == "fp8" else shape.element, size_bytes),
        "cache_ptr": Pointer("i16" if shape.kv_dtype == "fp8" else shape.kv_dtype, _POOL_BYTES),
        "table_ptr": Pointer("i32", 4 * call.sequences * -(-call.context_tokens // shape.page)),
        "lengths_ptr": Pointer("i32", 4 * call.sequences),
        "starts_ptr": Pointer("i32", 4 * (call.sequences + 1)),
        "k_scale_ptr": Pointer("fp32", 4),
        "v_scale_ptr": Pointer("fp32", 4),
        "out_ptr": Pointer(shape.element, size_bytes),
    }


def _strides(call: AttentionCall) -> dict[str, int | float]:
    """Strides of contiguous tensors, in the words that the kernels read: of the cache two bytes each, of queries two
    elements each with FP8.
    """
    shape = call.shape
    page_words = shape.page * 2 * shape.head_dim * KV_BYTES[shape.kv_dtype] // 2
    return {
        "scale": shape.head_dim**-0.5,
        "query_stride": shape.heads * shape.head_dim // (2 if shape.kv_dtype == "fp8" else 1),
        "block_stride": page_words * shape.kv_heads,
        "head_stride": page_words,
        "table_stride": -(-call.context_tokens // shape.page),
        "heads": shape.heads,
    }
