"""FP8 KV-cache scales: kept in float32, loaded for trunk and MTP layers alike."""

from __future__ import annotations

import re
from typing import Any

import torch
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod


class NL4KVCacheMethod(BaseKVCacheMethod):
    """vLLM's per-tensor method, with the loaded scale in float32.

    vLLM creates the parameters under the model's default dtype, so that a scale of 0.01 arrives as 0.01001 in
    bfloat16.
    """

    def create_weights(self, layer: torch.nn.Module) -> None:
        """Create the scalar parameters ``q_scale``, ``k_scale``, ``v_scale`` and ``prob_scale`` in float32."""
        super().create_weights(layer)
        for name in ("q_scale", "k_scale", "v_scale", "prob_scale"):
            parameter = getattr(layer, name)
            parameter.data = parameter.data.float()


def scales_in_effect(model: torch.nn.Module) -> dict[str, dict[str, float]]:
    """K and V scale that each attention layer of a loaded model uses, by layer number."""
    scales: dict[str, dict[str, float]] = {}
    for name, module in model.named_modules():
        layer = re.search(r"\.layers\.(\d+)\.(?:mtp_block\.)?self_attn\.attn$", name)
        if layer and hasattr(module, "_k_scale"):
            owner: Any = module
            scales[layer.group(1)] = {"k": float(owner._k_scale), "v": float(owner._v_scale)}
    return scales
