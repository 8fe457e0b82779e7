"""Pruning experts changes a model exactly as forbidding its router to choose them does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Step3p7ForConditionalGeneration

from step128_checkpoint.conversion import convert
from step128_checkpoint.pruning.criteria import keep_experts, unseen
from step128_checkpoint.pruning.decide import Pruning, experts_per_token
from step128_checkpoint.pruning.prune import plan_pruning
from step128_checkpoint.reader import open_checkpoint
from step128_checkpoint.tiny.reference import held_out_tokens, load_model


@pytest.fixture(scope="module")
def pruning(tiny: Path) -> Pruning:
    """10 of the tiny model's 16 experts, drawn at random in each layer, so that old and new numbers differ."""
    checkpoint = open_checkpoint(tiny)
    layers = [int(layer) for layer in checkpoint.text_config["moe_layers_enum"].split(",")]
    experts = checkpoint.text_config["moe_num_experts"]
    return Pruning({layer: keep_experts(unseen(experts), 10, "random", (), 0, layer) for layer in layers})


@pytest.fixture(scope="module")
def pruned(tiny: Path, pruning: Pruning, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "tiny-10"
    convert(plan_pruning(open_checkpoint(tiny), pruning), out, 1, False, lambda _: None)
    return out


def load(folder: Path) -> Step3p7ForConditionalGeneration:
    return Step3p7ForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def test_logits_equal_those_of_the_masked_model(tiny: Path, pruned: Path, pruning: Pruning) -> None:
    tokens = held_out_tokens(tiny, 256)[None]
    whole = load(tiny)
    unmasked = whole(input_ids=tokens).logits
    top_k = experts_per_token(open_checkpoint(tiny))
    masked_biases = 0
    for name, buffer in whole.named_buffers():
        if name.endswith("gate.e_score_correction_bias"):
            layer = int(name.split("layers.")[1].split(".")[0])
            dropped = sorted(set(range(len(buffer))) - set(pruning.kept[layer]))
            assert len(buffer) - len(dropped) >= top_k
            buffer[dropped] = -torch.inf
            masked_biases += 1
    assert masked_biases == len(pruning.kept)
    masked = whole(input_ids=tokens).logits
    sliced = load(pruned)(input_ids=tokens).logits
    # Not to the bit: the router's product has other widths in the two models and its top-k other orders, so that sums
    # round differently; norms and router round to float32 even in a float64 model.
    assert float((sliced - masked).abs().max()) < 1e-6 * float(masked.abs().max())
    assert torch.equal(sliced.argmax(-1), masked.argmax(-1))
    assert float((sliced - unmasked).abs().max()) > 1e-2  # and the experts did matter


@torch.no_grad()
def test_drafts_of_the_pruned_model_read_unchanged_weights(tiny: Path, pruned: Path) -> None:
    before, after = load_model(tiny).state_dict(), load_model(pruned).state_dict()
    first_mtp = open_checkpoint(tiny).num_hidden_layers
    mtp = [name for name in before if name.startswith("model.layers.") and int(name.split(".")[2]) >= first_mtp]
    assert mtp
    assert all(torch.equal(before[name], after[name]) for name in mtp)
