from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from step128_checkpoint.errors import ConfigurationError
from step128_checkpoint.policy import configs_folder, load_policy

TRUNK_LAYERS, MTP_LAYERS, FIRST_MOE_LAYER, VISION_BLOCKS = 45, 3, 3, 47
ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
MLP = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


def full_size_names() -> dict[str, str | None]:
    """Every weight name of the full-size model with the component it must fall in."""
    names: dict[str, str | None] = {
        "model.embed_tokens.weight": "embed_tokens",
        "lm_head.weight": "lm_head",
        "model.norm.weight": None,
        "vit_large_projector.weight": "vision_linears",
        "vision_model.conv1.weight": None,
        "vision_model.positional_embedding": None,
        "vision_model.vit_downsampler1.weight": None,
    }
    for layer in range(TRUNK_LAYERS + MTP_LAYERS):
        prefix = f"model.layers.{layer}"
        mtp = layer >= TRUNK_LAYERS
        names |= {f"{prefix}.{name}": "mtp_linears" if mtp else "attention" for name in ATTENTION}
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.g_proj"):
            names[f"{prefix}.{name}.weight"] = None
        names[f"{prefix}.self_attn.k_proj.k_scale"] = names[f"{prefix}.self_attn.v_proj.v_scale"] = None
        if mtp or layer < FIRST_MOE_LAYER:
            names |= {f"{prefix}.{name}": "mtp_linears" if mtp else "dense_mlp" for name in MLP}
        else:
            for kind in ("gate", "up", "down"):
                names[f"{prefix}.moe.{kind}_proj.weight"] = "routed_experts"
                names[f"{prefix}.share_expert.{kind}_proj.weight"] = "shared_experts"
            names[f"{prefix}.moe.gate.weight"] = names[f"{prefix}.moe.router_bias"] = None
        if mtp:
            names[f"{prefix}.eh_proj.weight"] = names[f"{prefix}.transformer.shared_head.norm.weight"] = None
            names[f"{prefix}.transformer.shared_head.output.weight"] = "mtp_heads"
    for block in range(VISION_BLOCKS):
        prefix = f"vision_model.transformer.resblocks.{block}"
        for name in ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"):
            names[f"{prefix}.{name}"] = "vision_linears"
        for name in ("attn.in_proj_bias", "mlp.c_fc.bias", "ln_1.weight", "ls_1.gamma"):
            names[f"{prefix}.{name}"] = None
    return names


def test_every_name_of_the_full_model_is_classified() -> None:
    policy = load_policy("all")
    names = full_size_names()
    assert {name: policy.component_of(name, TRUNK_LAYERS) for name in names} == names
    counts = Counter(component for component in names.values() if component)
    assert counts["routed_experts"] == 3 * 42
    assert counts["attention"] == 4 * 45
    assert counts["mtp_linears"] == 7 * 3


@pytest.mark.parametrize(
    ("policy", "quantized", "carried"),
    [
        ("experts", "model.layers.3.moe.up_proj.weight", "model.layers.3.self_attn.q_proj.weight"),
        ("experts+linears", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"),
        ("all-linears", "model.layers.45.transformer.shared_head.output.weight", "model.embed_tokens.weight"),
        ("all", "model.embed_tokens.weight", "model.layers.45.eh_proj.weight"),
    ],
)
def test_policies_grow(policy: str, quantized: str, carried: str) -> None:
    chosen = load_policy(policy)
    assert chosen.quantizes(quantized, TRUNK_LAYERS)
    assert not chosen.quantizes(carried, TRUNK_LAYERS)
    assert set(chosen.components) | set(chosen.unquantized) == set(chosen.patterns)


def test_default_policy_is_the_files() -> None:
    assert load_policy().name == "all-linears"


def test_unknown_policy_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"'most'.*experts, experts\+linears, all-linears, all") as raised:
        load_policy("most")
    assert raised.value.exit_code == 78


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format_version: 1", "format_version: 2", "format_version is 2"),
        ("experts: [routed_experts]", "experts: [rooted_experts]", "unknown component rooted_experts"),
        ("components:", "components: [", "not valid YAML"),
        ("policies:", "polices:", "policies is missing"),
    ],
)
def test_bad_policy_file_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (configs_folder() / "quantization" / "nl4.yaml").read_text()
    path = tmp_path / "nl4.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigurationError, match=message) as raised:
        load_policy("experts", path)
    assert str(path) in str(raised.value)


def test_configs_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEP128_CONFIGS_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match="nowhere"):
        load_policy()
