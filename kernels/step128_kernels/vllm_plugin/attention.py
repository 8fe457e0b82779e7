"""vLLM attention backend CUSTOM: paged attention by our kernels, on a CPU by their torch reference.

vLLM's own pool, page tables and metadata are used as they are; only the order of K and V within a page is ours
(:mod:`step128_kernels.attention.page_order`), written by the cache update here and read by nothing else.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import KVCacheLayout

from step128_kernels.attention import paged_attention, scratch_elements, update_kv_cache
from step128_kernels.attention.shape import HEAD_DIMS, KEYS_PER_GRANULE, MOST_GQA_RATIO

CPU_ATTENTION_VARIABLE = "STEP128_CPU_ATTENTION"
"""``1``: on a CPU, put our backend (its torch path) in the place of vLLM's own: for tests of all but the kernels."""

_FP8 = ("fp8", "fp8_e4m3")
_KV_16_BITS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_KV_CACHE_DTYPES = ("auto", *_KV_16_BITS, *_FP8)
_LAYER = (
    "step128 attention serves decoder layers of head size {sizes}, of {ratio} query heads for a KV head at most, {what}"
)


@dataclass
class PagedAttentionMetadata(AttentionMetadata):
    """One batch, for all layers that share a page table. Tensors are vLLM's persistent ones: a captured graph reads
    what a later step wrote there.
    """

    tokens: int
    """Rows of the query that count."""
    max_query_tokens: int
    max_context_tokens: int
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor


class PagedAttentionMetadataBuilder(AttentionMetadataBuilder[PagedAttentionMetadata]):
    """Hands vLLM's metadata on. Grids depend on its host-side sizes only, which a graph keeps: sequences, and the most
    query tokens of one.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_draft_decode_metadata_update = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if device.type == "cuda":
            from step128_kernels.vllm_plugin.attention_ahead import compile_layers

            compile_layers(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PagedAttentionMetadata:
        """Metadata of a step.

        Raises:
            NotImplementedError: the batch is not causal.
        """
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("step128 attention is causal only")
        return PagedAttentionMetadata(
            tokens=common.num_actual_tokens,
            max_query_tokens=common.max_query_len,
            max_context_tokens=common.max_seq_len,
            query_start=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
        )

    def update_draft_decode_metadata(self, metadata: PagedAttentionMetadata) -> None:
        """Nothing to refresh: the metadata's tensors are those that vLLM updates."""


class PagedAttentionBackend(AttentionBackend):
    """What vLLM asks of a backend."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(_KV_CACHE_DTYPES)
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """The name's member of vLLM's enum of backends."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[PagedAttentionImpl]:
        """One layer's part."""
        return PagedAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[PagedAttentionMetadataBuilder]:
        """One page table's part."""
        return PagedAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Pages of whole granules."""
        return [MultipleOf(KEYS_PER_GRANULE)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """As the kernels."""
        return list(HEAD_DIMS)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Head before token: a page of one head is then contiguous, and its inner order ours."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Step-3.7 has them."""
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoder layers only."""
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: Any, *arguments: Any, **keywords: Any
    ) -> str | None:
        """On a GPU the kernels take 16-bit queries, and 16-bit keys of the same type only."""
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            return None
        if dtype == torch.float32:
            return "float32 queries are served on a CPU only"
        if kv_cache_dtype in _KV_16_BITS and dtype != _KV_16_BITS[kv_cache_dtype]:
            return f"a KV cache of {kv_cache_dtype} needs a model of {kv_cache_dtype}"
        return None


class PagedAttentionOnCpu(PagedAttentionBackend):
    """The same in the place of vLLM's CPU backend, under that one's name."""

    @staticmethod
    def get_name() -> str:
        """As the backend that it replaces."""
        return "CPU_ATTN"


class PagedAttentionImpl(AttentionImpl[PagedAttentionMetadata]):
    """One attention layer."""

    supports_quant_query_input = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        unserved = {
            "ALiBi": alibi_slopes,
            "a soft cap": logits_soft_cap or None,
            "attention sinks": sinks,
            "a KV cache shared between layers": kv_sharing_target_layer_name,
        }
        kv_heads = num_kv_heads or num_heads
        what = [name for name, value in unserved.items() if value is not None]
        what += [f"head size {head_size}"] if head_size not in HEAD_DIMS else []
        ratio, rest = divmod(num_heads, kv_heads)
        what += [f"{num_heads} over {kv_heads} heads"] if rest or not 1 <= ratio <= MOST_GQA_RATIO else []
        what += [f"type {AttentionType(attn_type).value}"] if attn_type != AttentionType.DECODER else []
        what += [f"KV cache {kv_cache_dtype}"] if kv_cache_dtype not in _KV_CACHE_DTYPES else []
        if what:
            sizes = ", ".join(map(str, HEAD_DIMS))
            raise ValueError(_LAYER.format(sizes=sizes, ratio=MOST_GQA_RATIO, what=f"not {' and '.join(what)}"))
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, kv_heads, head_size
        self.scale, self.kv_cache_dtype = float(scale), kv_cache_dtype
        self.window = sliding_window or 0

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store K and V ``[tokens, kv_heads, head_size]`` of a step."""
        update_kv_cache(key, value, self._cache(kv_cache), slot_mapping, layer._k_scale, layer._v_scale)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PagedAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of a step into ``output`` ``[tokens, heads, head_size]``; K and V are in the cache already."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("step128 attention does not quantize its output")
        scratch = self._scratch(query.device)  # also while vLLM profiles, so that graphs find it allocated
        if attn_metadata is None:
            return output.fill_(0)
        paged_attention(
            query[: attn_metadata.tokens],
            self._cache(kv_cache),
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start,
            scale=self.scale,
            window=self.window,
            k_scale=layer._k_scale,
            v_scale=layer._v_scale,
            max_query_tokens=attn_metadata.max_query_tokens,
            max_context_tokens=attn_metadata.max_context_tokens,
            out=output[: attn_metadata.tokens],
            scratch=scratch,
        )
        return output

    def _cache(self, kv_cache: torch.Tensor) -> torch.Tensor:
        return kv_cache.view(torch.float8_e4m3fn) if self.kv_cache_dtype in _FP8 else kv_cache

    def _scratch(self, device: torch.device) -> torch.Tensor | None:
        """vLLM's workspace, which all layers of a worker share, one after the other; none on a CPU."""
        if device.type != "cuda":
            return None
        from vllm.v1.worker.workspace import current_workspace_manager

        size = (scratch_elements(self.num_heads, self.head_size),)
        scratch: torch.Tensor = current_workspace_manager().get_simultaneous((size, torch.float32))[0]
        return scratch


def register() -> None:
    """Register the backend as CUSTOM and, where the variable asks for it, in the place of vLLM's CPU backend."""
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.{PagedAttentionBackend.__qualname__}")
    if os.environ.get(CPU_ATTENTION_VARIABLE) == "1":
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{PagedAttentionOnCpu.__qualname__}")


def attention_in_use(model: torch.nn.Module) -> dict[str, str | None]:
    """``attention_backend``: names of the backends of a model's attention layers, joined by a plus sign;
    ``attention_path``: what computes in ours, ``triton`` or ``torch``, None without a layer of ours.
    """
    names, paths = set(), set()
    for module in model.modules():
        backend = getattr(module, "attn_backend", None)
        if backend is None or not hasattr(module, "kv_cache_dtype"):
            continue
        names.add(str(backend.get_name()))
        if isinstance(getattr(module, "impl", None), PagedAttentionImpl):
            parameter: Any = getattr(module, "_k_scale", None)
            paths.add("triton" if parameter is not None and parameter.is_cuda else "torch")
    return {"attention_backend": "+".join(sorted(names)) or None, "attention_path": "+".join(sorted(paths)) or None}
