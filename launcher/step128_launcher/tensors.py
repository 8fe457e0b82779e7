"""The tensors a Step-3.7 checkpoint must hold: name -> shape, dtype and component, derived from config.json.

Names and shapes follow the hub's checkpoint. Layers are `model.layers.{i}`; the MTP layers come after the trunk's.
Shapes: H hidden, V vocabulary, N output rows, K input columns, E experts; a linear weight is [N, K], experts [E, N, K].
"""

from collections.abc import Iterator
from dataclasses import dataclass

from step128_launcher.model_config import ModelConfig, VisionConfig
from step128_launcher.quantization import Format, Quantization

FLOAT_DTYPES = frozenset({"BF16", "F16", "F32"})

# Components for what no policy quantizes; vLLM keeps the router in float32 and copies these to every rank.
ROUTER, NORMS, HEAD_GATES, EH_PROJ, VISION_OTHER, KV_SCALES = (
    "router",
    "norms",
    "head_gates",
    "mtp_eh_proj",
    "vision_other",
    "kv_scales",
)


@dataclass(frozen=True)
class ExpectedTensor:
    """One tensor the checkpoint must hold; `component` also says whether a policy may quantize it.

    `role` is "weight", or, for the two tensors that replace a quantized weight, "packed" or "scale".
    """

    name: str
    shape: tuple[int, ...]
    dtypes: frozenset[str]
    component: str
    role: str = "weight"


def expected_tensors(config: ModelConfig, form: Format, quantization: Quantization | None) -> dict[str, ExpectedTensor]:
    """Return name -> expectation for all tensors but the KV-cache scales, with the MTP layers included."""
    components = form.tensor_components(config)
    quantized = quantization.components if quantization else frozenset()
    table: dict[str, ExpectedTensor] = {}
    for name, shape, fallback in _weights(config):
        component = components.get(name, fallback)
        if component not in quantized:
            table[name] = ExpectedTensor(name, shape, FLOAT_DTYPES, component)
            continue
        *outer, columns = shape
        packed, scale = f"{name}_packed", f"{name}_scale"
        table[packed] = ExpectedTensor(packed, (*outer, columns // 2), frozenset({"U8"}), component, "packed")
        scales = (*outer, columns // form.group_size)
        table[scale] = ExpectedTensor(scale, scales, frozenset({"F16"}), component, "scale")
    return table


def indivisible_columns(config: ModelConfig, form: Format, quantization: Quantization | None) -> tuple[str, int] | None:
    """Return the first quantized weight whose input dimension is no multiple of the group size, with that size."""
    components = form.tensor_components(config)
    quantized = quantization.components if quantization else frozenset()
    for name, shape, fallback in _weights(config):
        if components.get(name, fallback) in quantized and shape[-1] % form.group_size:
            return name, shape[-1]
    return None


def kv_scale_names(layer: int) -> tuple[str, str]:
    """Return the names of one attention layer's K and V scale."""
    attention = f"model.layers.{layer}.self_attn"
    return f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale"


def layer_of(name: str) -> int | None:
    """Return the decoder layer a tensor belongs to, or None."""
    parts = name.split(".", 3)
    return int(parts[2]) if len(parts) > 3 and parts[:2] == ["model", "layers"] and parts[2].isdigit() else None


_Weight = tuple[str, tuple[int, ...], str]


def _weights(config: ModelConfig) -> Iterator[_Weight]:
    """Yield (name, shape, component if no policy names it) of every weight, unquantized."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    yield "model.embed_tokens.weight", (vocabulary, hidden), "embed_tokens"
    for layer in config.main_layers:
        prefix = f"model.layers.{layer}"
        yield from _attention(config, layer)
        if layer not in config.moe_layers:
            yield from _mlp(f"{prefix}.mlp", hidden, config.intermediate_size)
            continue
        experts, inner = config.num_experts, config.moe_intermediate_size
        yield f"{prefix}.moe.gate.weight", (experts, hidden), ROUTER
        yield f"{prefix}.moe.router_bias", (experts,), ROUTER
        yield f"{prefix}.moe.gate_proj.weight", (experts, inner, hidden), "routed_experts"
        yield f"{prefix}.moe.up_proj.weight", (experts, inner, hidden), "routed_experts"
        yield f"{prefix}.moe.down_proj.weight", (experts, hidden, inner), "routed_experts"
        yield from _mlp(f"{prefix}.share_expert", hidden, config.shared_expert_size)
    yield "model.norm.weight", (hidden,), NORMS
    yield "lm_head.weight", (vocabulary, hidden), "lm_head"
    for layer in config.mtp_layer_indices:
        prefix = f"model.layers.{layer}"
        for norm in ("enorm", "hnorm", "transformer.shared_head.norm"):
            yield f"{prefix}.{norm}.weight", (hidden,), NORMS
        yield f"{prefix}.eh_proj.weight", (hidden, 2 * hidden), EH_PROJ
        yield f"{prefix}.transformer.shared_head.output.weight", (vocabulary, hidden), "mtp_heads"
        yield from _attention(config, layer)
        yield from _mlp(f"{prefix}.mlp", hidden, config.intermediate_size)
    yield from _vision(config.vision, hidden)


def _attention(config: ModelConfig, layer: int) -> Iterator[_Weight]:
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, groups = config.attention_heads(layer), config.num_kv_heads
    prefix = f"model.layers.{layer}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{norm}.weight", (hidden,), NORMS
    yield f"{prefix}.self_attn.q_proj.weight", (heads * head_dim, hidden), "attention"
    yield f"{prefix}.self_attn.k_proj.weight", (groups * head_dim, hidden), "attention"
    yield f"{prefix}.self_attn.v_proj.weight", (groups * head_dim, hidden), "attention"
    yield f"{prefix}.self_attn.o_proj.weight", (hidden, heads * head_dim), "attention"
    yield f"{prefix}.self_attn.g_proj.weight", (heads, hidden), HEAD_GATES
    yield f"{prefix}.self_attn.q_norm.weight", (head_dim,), NORMS
    yield f"{prefix}.self_attn.k_norm.weight", (head_dim,), NORMS


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[_Weight]:
    yield f"{prefix}.gate_proj.weight", (inner, hidden), "dense_mlp"
    yield f"{prefix}.up_proj.weight", (inner, hidden), "dense_mlp"
    yield f"{prefix}.down_proj.weight", (hidden, inner), "dense_mlp"


def _vision(vision: VisionConfig, hidden: int) -> Iterator[_Weight]:
    width, inner = vision.width, vision.mlp_width
    tower = "vision_model"
    yield f"{tower}.conv1.weight", (width, 3, vision.patch_size, vision.patch_size), VISION_OTHER
    yield f"{tower}.positional_embedding", (vision.patches, width), VISION_OTHER
    yield from _affine(f"{tower}.ln_pre", width)
    for layer in range(vision.layers):
        block = f"{tower}.transformer.resblocks.{layer}"
        yield f"{block}.attn.in_proj_weight", (3 * width, width), "vision_linears"
        yield f"{block}.attn.in_proj_bias", (3 * width,), VISION_OTHER
        yield f"{block}.attn.out_proj.weight", (width, width), "vision_linears"
        yield f"{block}.attn.out_proj.bias", (width,), VISION_OTHER
        yield f"{block}.mlp.c_fc.weight", (inner, width), "vision_linears"
        yield f"{block}.mlp.c_fc.bias", (inner,), VISION_OTHER
        yield f"{block}.mlp.c_proj.weight", (width, inner), "vision_linears"
        yield f"{block}.mlp.c_proj.bias", (width,), VISION_OTHER
        yield from _affine(f"{block}.ln_1", width)
        yield from _affine(f"{block}.ln_2", width)
        yield f"{block}.ls_1.gamma", (width,), VISION_OTHER
        yield f"{block}.ls_2.gamma", (width,), VISION_OTHER
    for index, (outputs, inputs) in enumerate(((2 * width, width), (4 * width, 2 * width)), start=1):
        yield f"{tower}.vit_downsampler{index}.weight", (outputs, inputs, 3, 3), VISION_OTHER
        yield f"{tower}.vit_downsampler{index}.bias", (outputs,), VISION_OTHER
    yield "vit_large_projector.weight", (hidden, 4 * width), "vision_linears"


def _affine(prefix: str, width: int) -> Iterator[_Weight]:
    yield f"{prefix}.weight", (width,), VISION_OTHER
    yield f"{prefix}.bias", (width,), VISION_OTHER
