"""Attention kernels of a server's layers, compiled while it loads: see :mod:`step128_kernels.compile_ahead`."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from step128_kernels.attention.shape import AttentionShape
from step128_kernels.compile_ahead import compile_attention
from step128_kernels.nl4_arguments import ELEMENTS


def compile_layers(kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
    """Compile what the layers of one page table may ask for.

    Args:
        kv_cache_spec: of these layers; gives the page size.
        layer_names: of vLLM's attention layers.
        vllm_config: vLLM's config.
        device: the GPU.
    """
    speculative = vllm_config.speculative_config
    verified = 1 + (speculative.num_speculative_tokens if speculative else 0)
    layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
    for impl in (layer.impl for layer in layers.values()):
        element = ELEMENTS[vllm_config.model_config.dtype]
        kv_dtype = "fp8" if impl.kv_cache_dtype.startswith("fp8") else element
        shape = AttentionShape(
            impl.num_heads, impl.num_kv_heads, impl.head_size, impl.window, kv_cache_spec.block_size, kv_dtype, element
        )
        compile_attention(
            shape,
            vllm_config.scheduler_config.max_num_seqs,
            (1, verified),
            vllm_config.model_config.max_model_len,
            device,
        )
