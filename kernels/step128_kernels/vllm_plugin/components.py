"""Which quantization component a vLLM module belongs to (pure: no vLLM import).

vLLM asks a quantization config about modules under its own names (fused ``qkv_proj``, ``moe.experts``,
``shared_head.head``); a checkpoint's ``quantization_config`` lists components. This table joins the two.
"""

from __future__ import annotations

import re

# First match wins. Names seen in vLLM 0.32 for Step3p7ForConditionalGeneration and Step3p5MTP.
_COMPONENT_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), component)
    for pattern, component in (
        (r"\.mtp_block\.(self_attn\.(qkv_proj|o_proj)|mlp\.(gate_up_proj|down_proj))$", "mtp_linears"),
        (r"\.shared_head\.head$", "mtp_heads"),
        (r"\.moe\.experts(\.routed_experts)?$", "routed_experts"),
        (r"\.share_expert\.(gate_up_proj|down_proj)$", "shared_experts"),
        (r"\.layers\.\d+\.self_attn\.(qkv_proj|o_proj)$", "attention"),
        (r"\.layers\.\d+\.mlp\.(gate_up_proj|down_proj)$", "dense_mlp"),
        (r"(^|\.)lm_head$", "lm_head"),
        (r"(^|\.)embed_tokens$", "embed_tokens"),
        (r"\.resblocks\.\d+\.(attn\.(qkv_proj|out_proj)|mlp\.(fc1|fc2))$", "vision_linears"),
        (r"(^|\.)vit_large_projector$", "vision_linears"),
    )
)


def component_of_module(module_name: str) -> str | None:
    """Component of a vLLM module, or None for one that no policy quantizes (router, g_proj, eh_proj, norms)."""
    for pattern, component in _COMPONENT_PATTERNS:
        if pattern.search(module_name):
            return component
    return None
