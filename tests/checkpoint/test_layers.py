"""One layer at a time gives what transformers' whole model gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Step3p7Config, Step3p7ForConditionalGeneration
from transformers.models.step3p7.modeling_step3p7 import Step3p7DecoderLayer, Step3p7MLP

from step128_checkpoint.calibration.layers import keep_in_place, load_layer, load_weight, run_layer, text_config
from step128_checkpoint.calibration.mtp import load_draft_layer
from step128_checkpoint.conversion import convert
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.policy import load_policy
from step128_checkpoint.quantize import plan_quantization
from step128_checkpoint.reader import Checkpoint, open_checkpoint
from step128_checkpoint.tiny.config import WINDOW_TOKENS
from step128_checkpoint.tiny.reference import held_out_tokens, load_model
from step128_kernels import codebook

TOKENS = WINDOW_TOKENS + 72


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def checkpoint(tiny: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(tiny) as opened:
        yield opened


@pytest.fixture(scope="module")
def ids(tiny: Path) -> Tensor:
    return held_out_tokens(tiny, 2 * TOKENS).view(2, TOKENS)


def chain(checkpoint: Checkpoint, ids: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Hidden states before every trunk layer and after the last."""
    config = text_config(checkpoint)
    states = [load_weight(checkpoint, "model.embed_tokens.weight", dtype, "cpu")[ids]]
    for number in range(checkpoint.num_hidden_layers):
        layer = load_layer(checkpoint, config, number, dtype, "cpu")
        states.append(run_layer(layer, number, states[-1]))
    return states


def test_the_chain_of_layers_is_transformers_model(tiny: Path, checkpoint: Checkpoint, ids: Tensor) -> None:
    model = Step3p7ForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32)
    seen: list[Tensor] = []
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=ids)
    found = chain(checkpoint, ids)[1:]
    assert len(seen) == len(found) == 9
    for number, (want, got) in enumerate(zip(seen, found, strict=True)):
        # float32 sums in another order
        assert (got - want).norm() <= 1e-5 * want.norm(), number


def test_padding_on_the_right_changes_nothing(checkpoint: Checkpoint, ids: Tensor) -> None:
    short = TOKENS - 50
    padded = ids.clone()
    padded[1, short:] = 7
    for number, (whole, alone) in enumerate(
        zip(chain(checkpoint, padded), chain(checkpoint, ids[1:, :short]), strict=True)
    ):
        assert (whole[1, :short] - alone[0]).norm() <= 1e-5 * alone.norm(), number


def test_every_layer_is_the_training_models(tiny: Path, checkpoint: Checkpoint, ids: Tensor) -> None:
    network, config = load_model(tiny), text_config(checkpoint)
    hidden = torch.randn(2, TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(TOKENS)
    for number, reference in enumerate(network.layers):
        layer = load_layer(checkpoint, config, number, torch.float32, "cpu")
        want = reference(hidden, positions)
        # float32 sums in another order
        assert (run_layer(layer, number, hidden) - want).norm() <= 1e-5 * want.norm(), number


def test_the_mtp_chain_is_the_training_models(tiny: Path, checkpoint: Checkpoint) -> None:
    network, config = load_model(tiny), text_config(checkpoint)
    hidden, embeddings = torch.randn(2, 2, TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(0))
    want = network.draft_hidden(hidden, embeddings)
    for number, state in zip(range(9, 12), want, strict=True):
        draft = load_draft_layer(checkpoint, config, number, torch.float32, "cpu")
        hidden = draft.run(hidden, embeddings)
        # float32 sums in another order
        assert (hidden - state).norm() <= 1e-5 * state.norm(), number
        head = network.mtp_layers[number - 9].head.norm(state)
        assert (draft.head_norm(hidden) - head).norm() <= 1e-5 * head.norm(), number


def test_a_cache_sees_and_replaces_k_and_v(checkpoint: Checkpoint) -> None:
    class Cache:
        def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
            seen.append((k, v, layer))
            return k, torch.zeros_like(v)

    seen: list[tuple[Tensor, Tensor, int]] = []
    config = text_config(checkpoint)
    layer = load_layer(checkpoint, config, 1, torch.float32, "cpu")
    hidden = torch.randn(1, 5, config.hidden_size)
    output = run_layer(layer, 1, hidden, Cache())
    ((k, v, number),) = seen
    assert number == 1 and k.shape == v.shape == (1, 2, 5, 64)
    normed = layer.post_attention_layernorm(hidden)  # attention added nothing
    assert torch.equal(output, hidden + layer.mlp(normed))
    # A rotation keeps the norm, and k_norm has set it.
    plain = layer.self_attn.k_norm(layer.self_attn.k_proj(layer.input_layernorm(hidden)).view(1, 5, 2, 64))
    assert torch.allclose(k.norm(dim=-1), plain.norm(dim=-1).transpose(1, 2), rtol=1e-5)
    assert not torch.allclose(k, plain.transpose(1, 2), rtol=1e-2)


def test_dropping_experts_in_place_leaves_the_others(checkpoint: Checkpoint) -> None:
    config, kept = text_config(checkpoint), [1, 2, 7, 8, 15]
    whole, part = (load_layer(checkpoint, config, 4, torch.bfloat16, "cpu") for _ in range(2))
    keep_in_place(part, kept)
    assert part.mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert part.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        by_expert = name.startswith(("mlp.experts.", "mlp.gate."))
        assert torch.equal(part.state_dict()[name], tensor[kept] if by_expert else tensor), name
    assert config.n_routed_experts == 16
    hidden = torch.randn(1, 9, config.hidden_size, dtype=torch.bfloat16)
    whole.mlp.gate.e_score_correction_bias[[e for e in range(16) if e not in kept]] = -10.0
    assert torch.equal(run_layer(part, 4, hidden), run_layer(whole, 4, hidden))


def test_packed_weights_are_dequantized(checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "nl4"
    convert(
        plan_quantization(checkpoint, load_policy("all-linears")),
        out,
        jobs=1,
        restart=False,
        on_progress=lambda _: None,
    )
    with checkpoint, open_checkpoint(out) as packed:
        name = "model.layers.4.moe.up_proj.weight"
        plain = load_weight(checkpoint, name, torch.float32, "cpu").numpy()
        want = codebook.dequantize(*codebook.quantize(plain))
        assert np.array_equal(load_weight(packed, name, torch.float32, "cpu").numpy(), want)
        layer = load_layer(packed, text_config(packed), 4, torch.float32, "cpu")
        assert np.array_equal(layer.mlp.experts.gate_up_proj[:, 64:].numpy(), want)
        assert np.array_equal(
            layer.mlp.gate.weight.numpy(),
            load_weight(checkpoint, "model.layers.4.moe.gate.weight", torch.float32, "cpu").numpy(),
        )


def test_big_weights_are_read_in_slices(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.4.moe.down_proj.weight"
    whole = load_weight(checkpoint, name, torch.float32, "cpu")
    monkeypatch.setattr("step128_checkpoint.calibration.weights._SLICE_WEIGHTS", 1000)
    assert torch.equal(load_weight(checkpoint, name, torch.float32, "cpu"), whole)


def test_wrong_weights_are_named(checkpoint: Checkpoint) -> None:
    config = text_config(checkpoint)
    with pytest.raises(CheckpointError, match=r"weight model\.layers\.12\..* is missing"):
        load_weight(checkpoint, "model.layers.12.input_layernorm.weight", torch.float32, "cpu")
    config.moe_intermediate_size = 32
    with pytest.raises(CheckpointError, match=r"moe\.(gate|down)_proj\.weight has shape .* config\.json makes it"):
        load_layer(checkpoint, config, 4, torch.float32, "cpu")


def test_the_real_config_gives_every_layer_what_it_states() -> None:
    values = json.loads((Path(__file__).parents[1] / "data/step-3.7-flash-240/config.json").read_text())
    text = values["text_config"]
    config = text_config(Checkpoint(Path("real"), values, {}))
    native = Step3p7Config.from_dict(values).text_config
    assert config.num_hidden_layers == len(config.layer_types) == 48 and native.num_hidden_layers == 45
    assert config.layer_types == text["layer_types"] and config.layer_types[45:] == native.mtp_layer_types
    assert config.rope_parameters == native.rope_parameters
    with torch.device("meta"):
        layers = [Step3p7DecoderLayer(config, number) for number in range(48)]
    for number, layer in enumerate(layers):
        full = text["layer_types"][number] == "full_attention"
        assert layer.self_attn.num_heads == (64 if full else 96), number
        assert layer.self_attn.sliding_window == (None if full else 512), number
        dense, limited = number < 3 or number > 44, number in (43, 44)
        assert isinstance(layer.mlp, Step3p7MLP) == dense, number
        if not dense:
            assert layer.mlp.experts.num_experts == 240
            assert layer.mlp.experts.limit == (7.0 if limited else float("inf")), number
            assert layer.mlp.shared_experts.limit == (16.0 if limited else float("inf")), number


def test_a_config_that_transformers_refuses(checkpoint: Checkpoint) -> None:
    bad = dict(checkpoint.config, text_config=dict(checkpoint.text_config, hidden_size="wide"))
    with pytest.raises(CheckpointError, match=r"config\.json: transformers cannot read text_config"):
        text_config(Checkpoint(checkpoint.folder, bad, checkpoint.tensors))
