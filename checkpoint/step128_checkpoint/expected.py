"""The weights that a Step-3.7 checkpoint must hold, derived from its config.json, and how one differs from that.

Names and shapes are the hub's. Shapes: H hidden, V vocabulary, N output rows, K input columns, E experts; a linear
weight is [N, K], experts are [E, N, K].
"""

from __future__ import annotations

from collections.abc import Iterator

from step128_checkpoint.dimensions import Dimensions, VisionDimensions, layer_of, read_dimensions
from step128_checkpoint.dtypes import FLOAT_DTYPES
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.header import TensorInfo
from step128_checkpoint.kv_scales import KV_SCALE, kv_scale_problems
from step128_checkpoint.policy import PACKED_SUFFIX, SCALE_SUFFIX
from step128_checkpoint.reader import Checkpoint

_EXAMPLES = 3  # names shown of a list of missing or unknown tensors

_Shape = tuple[int, ...]


def structure_problems(checkpoint: Checkpoint) -> list[str]:
    """Say how a checkpoint, quantized or not, contradicts its config.json; empty if it does not.

    The MTP layers may be absent altogether: such a checkpoint is served without drafts.
    """
    try:
        dimensions = read_dimensions(checkpoint)
    except CheckpointError as error:
        return [str(error)]
    layers, mtp_layers = dimensions.num_hidden_layers, dimensions.num_mtp_layers
    numbers = {layer_of(name) for name in checkpoint.tensors}
    mtp_layers = mtp_layers if any(layers + i in numbers for i in range(mtp_layers)) else 0
    expected = dict(expected_weights(dimensions, mtp_layers))
    stored = _stored_weights(checkpoint)
    problems = []
    if missing := [name for name in expected if name not in stored]:
        problems.append(f"{checkpoint.folder}: {len(missing)} of {len(expected)} tensors are missing: {_list(missing)}")
    if unknown := [name for name in stored if name not in expected]:
        problems.append(f"{checkpoint.folder}: {len(unknown)} tensors that this model does not have: {_list(unknown)}")
    for name, (tensor, shape) in stored.items():
        where = f"{tensor.path}: tensor {tensor.name}"
        if name == tensor.name and tensor.dtype not in FLOAT_DTYPES:
            problems.append(f"{where} has type {tensor.dtype}; {', '.join(sorted(FLOAT_DTYPES))} can be used")
        if shape != expected.get(name, shape):
            problems.append(f"{where} has shape {list(shape)}; config.json makes it {list(expected[name])}")
    return problems + kv_scale_problems(checkpoint, layers, mtp_layers)


def expected_weights(dimensions: Dimensions, num_mtp_layers: int) -> Iterator[tuple[str, _Shape]]:
    """Yield name and unquantized shape of every weight; the KV scales, which are optional, are not among them."""
    d, hidden = dimensions, dimensions.hidden_size
    yield "model.embed_tokens.weight", (d.vocab_size, hidden)
    for layer in range(d.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield from _attention(d, layer)
        if layer not in d.moe_layers:
            yield from _mlp(f"{prefix}.mlp", hidden, d.intermediate_size)
            continue
        yield f"{prefix}.moe.gate.weight", (d.num_experts, hidden)
        yield f"{prefix}.moe.router_bias", (d.num_experts,)
        for name, shape in _mlp(f"{prefix}.moe", hidden, d.moe_intermediate_size):
            yield name, (d.num_experts, *shape)
        yield from _mlp(f"{prefix}.share_expert", hidden, d.shared_expert_size)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (d.vocab_size, hidden)
    for layer in range(d.num_hidden_layers, d.num_hidden_layers + num_mtp_layers):
        prefix = f"model.layers.{layer}"
        for norm in ("enorm", "hnorm", "transformer.shared_head.norm"):
            yield f"{prefix}.{norm}.weight", (hidden,)
        yield f"{prefix}.eh_proj.weight", (hidden, 2 * hidden)
        yield f"{prefix}.transformer.shared_head.output.weight", (d.vocab_size, hidden)
        yield from _attention(d, layer)
        yield from _mlp(f"{prefix}.mlp", hidden, d.intermediate_size)
    yield from _vision(d.vision)
    yield "vit_large_projector.weight", (hidden, 4 * d.vision.width)


def _attention(d: Dimensions, layer: int) -> Iterator[tuple[str, _Shape]]:
    hidden, heads, width = d.hidden_size, d.heads[layer], d.heads[layer] * d.head_dim
    shapes: dict[str, _Shape] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (width, hidden),
        "self_attn.k_proj": (d.num_kv_heads * d.head_dim, hidden),
        "self_attn.v_proj": (d.num_kv_heads * d.head_dim, hidden),
        "self_attn.o_proj": (hidden, width),
        "self_attn.g_proj": (heads, hidden),
        "self_attn.q_norm": (d.head_dim,),
        "self_attn.k_norm": (d.head_dim,),
    }
    for name, shape in shapes.items():
        yield f"model.layers.{layer}.{name}.weight", shape


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, _Shape]]:
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, inner)


def _vision(d: VisionDimensions) -> Iterator[tuple[str, _Shape]]:
    width, inner = d.width, d.mlp_width
    yield "vision_model.conv1.weight", (width, 3, d.patch_size, d.patch_size)
    yield "vision_model.positional_embedding", (d.patches, width)
    shapes: dict[str, _Shape] = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "mlp.c_fc.weight": (inner, width),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (width, inner),
        **{f"{name}.bias": (width,) for name in ("attn.out_proj", "mlp.c_proj", "ln_1", "ln_2")},
        **dict.fromkeys(("ln_1.weight", "ln_2.weight", "ls_1.gamma", "ls_2.gamma"), (width,)),
    }
    for layer in range(d.layers):
        for name, shape in shapes.items():
            yield f"vision_model.transformer.resblocks.{layer}.{name}", shape
    yield "vision_model.ln_pre.weight", (width,)
    yield "vision_model.ln_pre.bias", (width,)
    for number, inputs in ((1, width), (2, 2 * width)):
        yield f"vision_model.vit_downsampler{number}.weight", (2 * inputs, inputs, 3, 3)
        yield f"vision_model.vit_downsampler{number}.bias", (2 * inputs,)


def _stored_weights(checkpoint: Checkpoint) -> dict[str, tuple[TensorInfo, _Shape]]:
    """Each weight's name with the tensor that holds it and its unquantized shape; scales are left out.

    A weight that is there twice, packed and plain, shows up under its packed name, which no model has.
    """
    stored: dict[str, tuple[TensorInfo, _Shape]] = {}
    for name, tensor in checkpoint.tensors.items():
        base = name.removesuffix(PACKED_SUFFIX)
        if name.endswith(f"weight{PACKED_SUFFIX}") and base not in checkpoint.tensors:
            stored[base] = tensor, (*tensor.shape[:-1], 2 * tensor.shape[-1]) if tensor.shape else ()
        elif not KV_SCALE.fullmatch(name) and not name.endswith(f"weight{SCALE_SUFFIX}"):
            stored[name] = tensor, tensor.shape
    return stored


def _list(names: list[str]) -> str:
    return ", ".join(names[:_EXAMPLES]) + (", ..." if len(names) > _EXAMPLES else "")
