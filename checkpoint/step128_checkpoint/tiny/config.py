"""The shape of the tiny Step-3.7: the hub's config.json with every number made smaller, and what the model reads of it.

Nothing structural is left out: full and sliding attention 1:3 with different head counts, dense first layers, routed
and shared experts, swiglu limits on the last layers, multi-token-prediction (MTP) layers and a vision tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TRUNK_LAYERS = 9
MTP_LAYERS = 3
WINDOW_TOKENS = 128
VOCAB_SIZE = 2048
MAX_POSITION_EMBEDDINGS = 16384
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class LayerSpec:
    """What distinguishes one decoder layer from another; read from the per-layer lists of `text_config`."""

    index: int
    sliding: bool
    num_heads: int
    rope_theta: float
    rotary_dim: int
    rope_scaling: dict[str, Any] | None
    is_moe: bool
    is_mtp: bool
    routed_limit: float  # clamp of the routed experts' SwiGLU; 0 means none
    shared_limit: float  # clamp of the shared expert's or the dense MLP's SwiGLU; 0 means none


@dataclass(frozen=True)
class TextSpec:
    """The numbers of `text_config` that the model needs, with the per-layer lists already taken apart."""

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    head_dim: int
    num_kv_heads: int
    num_experts: int
    experts_per_token: int
    expert_dim: int
    shared_dim: int
    router_scale: float
    window_tokens: int
    norm_eps: float
    image_token_id: int
    layers: tuple[LayerSpec, ...]

    @property
    def trunk(self) -> tuple[LayerSpec, ...]:
        """Decoder layers of the trunk."""
        return tuple(layer for layer in self.layers if not layer.is_mtp)

    @property
    def mtp(self) -> tuple[LayerSpec, ...]:
        """Multi-token-prediction layers, in drafting order."""
        return tuple(layer for layer in self.layers if layer.is_mtp)


def hub_config(*, image_token_id: int, bos_token_id: int, eos_token_ids: list[int]) -> dict[str, Any]:
    """config.json of the tiny checkpoint, in the hub's spelling and without `auto_map` (no remote code).

    The ids come from the tokenizer, which is trained before the model.
    """
    types = [FULL if i % 4 == 0 else SLIDING for i in range(TRUNK_LAYERS)] + [SLIDING] * MTP_LAYERS
    limited = {TRUNK_LAYERS - 2, TRUNK_LAYERS - 1}
    text = {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": TRUNK_LAYERS,
        "max_seq_len": MAX_POSITION_EMBEDDINGS,
        "max_position_embeddings": MAX_POSITION_EMBEDDINGS,
        "vocab_size": VOCAB_SIZE,
        "torch_dtype": "bfloat16",
        "use_qk_norm": True,
        "zero_centered": True,
        "sink": False,
        "use_moe": True,
        "moe_every_n_layer": 1,
        "moe_layer_offset": 0,
        "moe_layers_enum": ",".join(str(i) for i in range(3, TRUNK_LAYERS)),
        "num_attention_heads": 4,
        "num_attention_groups": 2,
        "head_dim": 64,
        "moe_num_experts": 16,
        "moe_top_k": 4,
        "moe_intermediate_size": 64,
        "share_expert_dim": 64,
        "norm_expert_weight": True,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "att_impl_type": "GQA",
        "num_nextn_predict_layers": MTP_LAYERS,
        "rope_theta": [5000000.0 if kind == FULL else 10000.0 for kind in types],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": MAX_POSITION_EMBEDDINGS // 2,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        },
        "yarn_only_types": [FULL],
        "use_rope_layers": [],
        "use_head_wise_attn_gate": True,
        "sliding_window": WINDOW_TOKENS,
        "layer_types": types,
        "partial_rotary_factors": [0.5 if kind == FULL else 1.0 for kind in types],
        "attention_other_setting": {
            "attention_type": SLIDING,
            "num_attention_heads": 6,
            "num_attention_groups": 2,
            "head_dim": 64,
            "true_head_dim": 64,
        },
        "swiglu_limits": [7.0 if i in limited else 0.0 for i in range(len(types))],
        "swiglu_limits_shared": [16.0 if i in limited else 0.0 for i in range(len(types))],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_ids,
    }
    return {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "image_token_id": image_token_id,
        "image_token_len": 169,
        "patch_token_len": 81,
        "im_start_token": "<im_start>",
        "im_end_token": "<im_end>",
        "im_patch_token": "<im_patch>",
        "understand_projector_stride": 2,
        "projector_bias": False,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "model_type": "perception_encoder",
            "image_size": 728,
            "patch_size": 14,
            "width": 64,
            "layers": 2,
            "heads": 4,
            "mlp_ratio": 2.0,
            "use_cls_token": False,
            "use_ln_pre": True,
            "use_ln_post": False,
            "use_abs_posemb": True,
            "use_rope2d": True,
            "ls_init_value": 0.1,
            "hidden_act": "quick_gelu",
            "output_dim": None,
            "pool_type": "none",
        },
        "text_config": text,
    }


def text_spec(config: dict[str, Any]) -> TextSpec:
    """Take a Step-3.7 config.json apart.

    Raises KeyError if a field is missing and IndexError if a per-layer list is shorter than trunk + MTP layers.
    """
    text = config["text_config"]
    trunk, total = text["num_hidden_layers"], text["num_hidden_layers"] + text["num_nextn_predict_layers"]
    moe_layers = {int(i) for i in text["moe_layers_enum"].split(",")}
    other = text["attention_other_setting"]

    def layer(i: int) -> LayerSpec:
        kind = text["layer_types"][i]
        return LayerSpec(
            index=i,
            sliding=kind == SLIDING,
            num_heads=other["num_attention_heads"] if kind == other["attention_type"] else text["num_attention_heads"],
            rope_theta=text["rope_theta"][i],
            rotary_dim=int(text["head_dim"] * text["partial_rotary_factors"][i]),
            rope_scaling=text["rope_scaling"] if kind in text["yarn_only_types"] else None,
            is_moe=i in moe_layers,
            is_mtp=i >= trunk,
            routed_limit=text["swiglu_limits"][i] or 0.0,
            shared_limit=text["swiglu_limits_shared"][i] or 0.0,
        )

    return TextSpec(
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        vocab_size=text["vocab_size"],
        head_dim=text["head_dim"],
        num_kv_heads=text["num_attention_groups"],
        num_experts=text["moe_num_experts"],
        experts_per_token=text["moe_top_k"],
        expert_dim=text["moe_intermediate_size"],
        shared_dim=text["share_expert_dim"],
        router_scale=text["moe_router_scaling_factor"],
        window_tokens=text["sliding_window"],
        norm_eps=text["rms_norm_eps"],
        image_token_id=config["image_token_id"],
        layers=tuple(layer(i) for i in range(total)),
    )
