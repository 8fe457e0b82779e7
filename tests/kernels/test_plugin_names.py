"""Names: vLLM's parameters back to the hub's tensors, and vLLM's modules to quantization components."""

import pytest

from step128_kernels.vllm_plugin.components import component_of_module
from step128_kernels.vllm_plugin.names import checkpoint_names, describe_mismatch, needed_tensors


@pytest.mark.parametrize(
    ("parameter", "tensors"),
    [
        (
            "language_model.model.layers.3.self_attn.qkv_proj.weight_packed",
            [f"model.layers.3.self_attn.{p}_proj.weight_packed" for p in "qkv"],
        ),
        (
            "language_model.model.layers.3.moe.experts.routed_experts.w13_weight_scale",
            ["model.layers.3.moe.gate_proj.weight_scale", "model.layers.3.moe.up_proj.weight_scale"],
        ),
        (
            "language_model.model.layers.3.moe.experts.routed_experts.w2_weight_packed",
            ["model.layers.3.moe.down_proj.weight_packed"],
        ),
        (
            "language_model.model.layers.3.moe.share_expert.gate_up_proj.weight",
            ["model.layers.3.share_expert.gate_proj.weight", "model.layers.3.share_expert.up_proj.weight"],
        ),
        ("language_model.model.layers.3.moe.router_bias", ["model.layers.3.moe.router_bias"]),
        ("language_model.model.embed_tokens.weight_packed", ["model.embed_tokens.weight_packed"]),
        ("language_model.lm_head.weight", ["lm_head.weight"]),
        ("model.layers.45.shared_head.head.weight", ["model.layers.45.transformer.shared_head.output.weight"]),
        ("model.layers.45.shared_head.norm.weight", ["model.layers.45.transformer.shared_head.norm.weight"]),
        ("model.layers.45.mtp_block.self_attn.o_proj.weight", ["model.layers.45.self_attn.o_proj.weight"]),
        ("model.layers.45.eh_proj.weight", ["model.layers.45.eh_proj.weight"]),
        (
            "vision_model.transformer.resblocks.0.attn.qkv_proj.weight_packed",
            ["vision_model.transformer.resblocks.0.attn.in_proj_weight_packed"],
        ),
        (
            "vision_model.transformer.resblocks.0.attn.qkv_proj.bias",
            ["vision_model.transformer.resblocks.0.attn.in_proj_bias"],
        ),
        (
            "vision_model.transformer.resblocks.0.mlp.fc2.weight",
            ["vision_model.transformer.resblocks.0.mlp.c_proj.weight"],
        ),
        ("language_model.model.layers.0.self_attn.attn.k_scale", []),
    ],
)
def test_checkpoint_names(parameter: str, tensors: list[str]) -> None:
    assert list(checkpoint_names(parameter)) == tensors


LAYER = "model.layers.3."
NORM = LAYER + "input_layernorm.weight"
K_SCALE, V_SCALE = (f"{LAYER}self_attn.{which}_proj.{which}_scale" for which in "kv")


def test_mismatch_names_both_sides_and_guesses() -> None:
    k_proj, misnamed = f"{LAYER}self_attn.k_proj.weight", f"{LAYER}self_attn.k_porj.weight"
    sentence = describe_mismatch({k_proj, NORM}, dict.fromkeys([misnamed, NORM, K_SCALE, V_SCALE], "BF16"))
    assert sentence is not None
    assert f"missing tensor {k_proj}" in sentence
    assert f"is {misnamed} meant to be" in sentence
    assert "_scale" not in sentence


@pytest.mark.parametrize(
    ("present", "sentence"),
    [
        ({NORM: "BF16"}, None),
        ({NORM: "F32", K_SCALE: "F32", V_SCALE: "F32"}, None),
        ({NORM: "F32", V_SCALE: "F32"}, f"missing tensor {K_SCALE}"),
        ({NORM: "F32", K_SCALE: "F32"}, f"missing tensor {V_SCALE}"),
        ({NORM: "F32", "model.layers.9.anything": "BOOL", "lm_head.weight": "U8"}, None),  # other parts of the model
        ({NORM: "F32", LAYER + "self_attn.rotary_emb.inv_freq": "F32"}, None),
        ({NORM: "I8"}, f"tensor {NORM} is I8, it must be BF16 or F16 or F32"),
    ],
)
def test_mismatch(present: dict[str, str], sentence: str | None) -> None:
    assert describe_mismatch({NORM}, present) == sentence


@pytest.mark.parametrize(("suffix", "right", "wrong"), [("packed", "U8", "F16"), ("scale", "F16", "BF16")])
def test_quantized_tensors_have_one_dtype(suffix: str, right: str, wrong: str) -> None:
    name = f"{LAYER}self_attn.o_proj.weight_{suffix}"
    assert describe_mismatch({name}, {name: right}) is None
    assert describe_mismatch({name}, {name: wrong}) == f"tensor {name} is {wrong}, it must be {right}"


def test_a_drafter_needs_only_its_layers() -> None:
    parameters = ["model.embed_tokens.weight", "model.layers.45.eh_proj.weight"]
    assert needed_tensors(parameters, is_draft=True) == {"model.layers.45.eh_proj.weight"}
    assert needed_tensors(parameters, is_draft=False) == set(parameters)


@pytest.mark.parametrize(
    ("module", "component"),
    [
        ("language_model.model.layers.4.moe.experts", "routed_experts"),
        ("language_model.model.layers.4.moe.experts.routed_experts", "routed_experts"),
        ("language_model.model.layers.4.moe.share_expert.down_proj", "shared_experts"),
        ("language_model.model.layers.4.self_attn.qkv_proj", "attention"),
        ("language_model.model.layers.4.self_attn.g_proj", None),
        ("language_model.model.layers.4.moe.gate", None),
        ("language_model.model.layers.0.mlp.gate_up_proj", "dense_mlp"),
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.embed_tokens", "embed_tokens"),
        ("model.layers.45.mtp_block.self_attn.qkv_proj", "mtp_linears"),
        ("model.layers.45.mtp_block.mlp.down_proj", "mtp_linears"),
        ("model.layers.45.mtp_block.self_attn.g_proj", None),
        ("model.layers.45.shared_head.head", "mtp_heads"),
        ("model.layers.45.eh_proj", None),
        ("vision_model.transformer.resblocks.7.attn.out_proj", "vision_linears"),
        ("vision_model.transformer.resblocks.7.mlp.fc1", "vision_linears"),
        ("vit_large_projector", "vision_linears"),
    ],
)
def test_component_of_module(module: str, component: str | None) -> None:
    assert component_of_module(module) == component
