"""Every weight of a Step-3.7 model, derived from config.json: name, shape, component, and how vLLM divides it.

Names and shapes follow the hub's checkpoint. Layers are `model.layers.{i}`; the MTP layers come after the trunk's.
Shapes: H hidden, V vocabulary, N output rows, K input columns, E experts; a linear weight is [N, K], experts [E, N, K].
"""

import re
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from step128_launcher.model.model_config import ModelConfig, VisionConfig

# Components for what no policy quantizes.
ROUTER, NORMS, HEAD_GATES, EH_PROJ, VISION_OTHER, KV_SCALES = (
    "router",
    "norms",
    "head_gates",
    "mtp_eh_proj",
    "vision_other",
    "kv_scales",
)
ROUTED_EXPERTS, VISION_LINEARS = "routed_experts", "vision_linears"


class Cut(Enum):
    """How vLLM 0.32 divides a weight among tensor-parallel ranks (the layer classes of models/step3p5.py, step_vl.py).

    Source: ColumnParallelLinear cuts ROWS, RowParallelLinear COLUMNS (its bias stays WHOLE), QKVParallelLinear cuts K
    and V by heads (KV_ROWS: a head is copied once there are more ranks than heads), VocabParallelEmbedding pads the
    VOCABULARY first. The router, eh_proj, norms, convolutions and position embeddings are WHOLE on every rank.
    """

    WHOLE = "whole"
    ROWS = "rows"
    COLUMNS = "columns"
    KV_ROWS = "KV heads"
    VOCABULARY = "vocabulary"


class Weight(NamedTuple):
    """One weight, unquantized; `component` is the one it has if no policy's pattern names it."""

    name: str
    shape: tuple[int, ...]
    component: str
    cut: Cut


def model_weights(config: ModelConfig) -> Iterator[Weight]:
    """Yield every weight with the MTP layers included, experts as one 3-D weight."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    yield Weight("model.embed_tokens.weight", (vocabulary, hidden), "embed_tokens", Cut.VOCABULARY)
    for layer in config.main_layers:
        prefix = f"model.layers.{layer}"
        yield from _attention(config, layer)
        if layer not in config.moe_layers:
            yield from _mlp(f"{prefix}.mlp", hidden, config.intermediate_size)
            continue
        experts, inner = config.num_experts, config.moe_intermediate_size
        yield Weight(f"{prefix}.moe.gate.weight", (experts, hidden), ROUTER, Cut.WHOLE)
        yield Weight(f"{prefix}.moe.router_bias", (experts,), ROUTER, Cut.WHOLE)
        yield Weight(f"{prefix}.moe.gate_proj.weight", (experts, inner, hidden), ROUTED_EXPERTS, Cut.ROWS)
        yield Weight(f"{prefix}.moe.up_proj.weight", (experts, inner, hidden), ROUTED_EXPERTS, Cut.ROWS)
        yield Weight(f"{prefix}.moe.down_proj.weight", (experts, hidden, inner), ROUTED_EXPERTS, Cut.COLUMNS)
        yield from _mlp(f"{prefix}.share_expert", hidden, config.shared_expert_size)
    yield Weight("model.norm.weight", (hidden,), NORMS, Cut.WHOLE)
    yield Weight("lm_head.weight", (vocabulary, hidden), "lm_head", Cut.VOCABULARY)
    for layer in config.mtp_layer_indices:
        prefix = f"model.layers.{layer}"
        for norm in ("enorm", "hnorm", "transformer.shared_head.norm"):
            yield Weight(f"{prefix}.{norm}.weight", (hidden,), NORMS, Cut.WHOLE)
        yield Weight(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden), EH_PROJ, Cut.WHOLE)
        head = f"{prefix}.transformer.shared_head.output.weight"
        yield Weight(head, (vocabulary, hidden), "mtp_heads", Cut.VOCABULARY)
        yield from _attention(config, layer)
        yield from _mlp(f"{prefix}.mlp", hidden, config.intermediate_size)
    yield from _vision(config.vision, hidden)


_FUSED = re.compile(r"(.*\.moe)\.((?:gate|up|down)_proj\.weight)")
PER_EXPERT_MARK = ".moe.experts."


def split_experts(weight: Weight) -> Iterator[Weight]:
    """Yield a 3-D expert weight as the 2-D weights of a checkpoint with each expert apart; others as they are."""
    match = _FUSED.fullmatch(weight.name)
    if match is None:
        yield weight
        return
    experts, *shape = weight.shape
    for expert in range(experts):
        yield Weight(f"{match[1]}.experts.{expert}.{match[2]}", tuple(shape), weight.component, weight.cut)


def _attention(config: ModelConfig, layer: int) -> Iterator[Weight]:
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, groups = config.attention_heads(layer), config.num_kv_heads
    prefix = f"model.layers.{layer}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield Weight(f"{prefix}.{norm}.weight", (hidden,), NORMS, Cut.WHOLE)
    yield Weight(f"{prefix}.self_attn.q_proj.weight", (heads * head_dim, hidden), "attention", Cut.ROWS)
    yield Weight(f"{prefix}.self_attn.k_proj.weight", (groups * head_dim, hidden), "attention", Cut.KV_ROWS)
    yield Weight(f"{prefix}.self_attn.v_proj.weight", (groups * head_dim, hidden), "attention", Cut.KV_ROWS)
    yield Weight(f"{prefix}.self_attn.o_proj.weight", (hidden, heads * head_dim), "attention", Cut.COLUMNS)
    yield Weight(f"{prefix}.self_attn.g_proj.weight", (heads, hidden), HEAD_GATES, Cut.ROWS)
    yield Weight(f"{prefix}.self_attn.q_norm.weight", (head_dim,), NORMS, Cut.WHOLE)
    yield Weight(f"{prefix}.self_attn.k_norm.weight", (head_dim,), NORMS, Cut.WHOLE)


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[Weight]:
    yield Weight(f"{prefix}.gate_proj.weight", (inner, hidden), "dense_mlp", Cut.ROWS)
    yield Weight(f"{prefix}.up_proj.weight", (inner, hidden), "dense_mlp", Cut.ROWS)
    yield Weight(f"{prefix}.down_proj.weight", (hidden, inner), "dense_mlp", Cut.COLUMNS)


def _vision(vision: VisionConfig, hidden: int) -> Iterator[Weight]:
    width, inner = vision.width, vision.mlp_width
    tower = "vision_model"
    yield _other(f"{tower}.conv1.weight", width, 3, vision.patch_size, vision.patch_size)
    yield _other(f"{tower}.positional_embedding", vision.patches, width)
    yield from _affine(f"{tower}.ln_pre", width)
    for layer in range(vision.layers):
        block = f"{tower}.transformer.resblocks.{layer}"
        yield Weight(f"{block}.attn.in_proj_weight", (3 * width, width), VISION_LINEARS, Cut.ROWS)
        yield Weight(f"{block}.attn.in_proj_bias", (3 * width,), VISION_OTHER, Cut.ROWS)
        yield Weight(f"{block}.attn.out_proj.weight", (width, width), VISION_LINEARS, Cut.COLUMNS)
        yield _other(f"{block}.attn.out_proj.bias", width)
        yield Weight(f"{block}.mlp.c_fc.weight", (inner, width), VISION_LINEARS, Cut.ROWS)
        yield Weight(f"{block}.mlp.c_fc.bias", (inner,), VISION_OTHER, Cut.ROWS)
        yield Weight(f"{block}.mlp.c_proj.weight", (width, inner), VISION_LINEARS, Cut.COLUMNS)
        yield _other(f"{block}.mlp.c_proj.bias", width)
        yield from _affine(f"{block}.ln_1", width)
        yield from _affine(f"{block}.ln_2", width)
        yield _other(f"{block}.ls_1.gamma", width)
        yield _other(f"{block}.ls_2.gamma", width)
    for index, (outputs, inputs) in enumerate(((2 * width, width), (4 * width, 2 * width)), start=1):
        yield _other(f"{tower}.vit_downsampler{index}.weight", outputs, inputs, 3, 3)
        yield _other(f"{tower}.vit_downsampler{index}.bias", outputs)
    yield Weight("vit_large_projector.weight", (hidden, 4 * width), VISION_LINEARS, Cut.ROWS)


def _affine(prefix: str, width: int) -> Iterator[Weight]:
    yield _other(f"{prefix}.weight", width)
    yield _other(f"{prefix}.bias", width)


def _other(name: str, *shape: int) -> Weight:
    return Weight(name, shape, VISION_OTHER, Cut.WHOLE)
