"""What a visit to a layer measures, against plain computations of the same quantities."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.step3p7.modeling_step3p7 import Step3p7DecoderLayer, Step3p7Experts

from step128_checkpoint.calibration.experts import run_experts
from step128_checkpoint.calibration.kv_ranges import KvRanges
from step128_checkpoint.calibration.layers import load_layer, run_layer, text_config
from step128_checkpoint.calibration.moments import SecondMoments
from step128_checkpoint.calibration.observers import LayerObserver
from step128_checkpoint.reader import open_checkpoint

LIMITED, UNLIMITED = 7, 4  # layers of the tiny model with and without a clamp in the experts' SwiGLU
EXPERTS, TOP_K, ROUTED_LIMIT = 16, 4, 7.0


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_of(tiny: Path, number: int, dtype: torch.dtype = torch.float32) -> Step3p7DecoderLayer:
    with open_checkpoint(tiny) as checkpoint:
        return load_layer(checkpoint, text_config(checkpoint), number, dtype, "cpu")


def nothing(*_: Any) -> None:
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [LIMITED, UNLIMITED])
def test_experts_run_bit_for_bit_as_transformers_runs_them(tiny: Path, number: int, dtype: torch.dtype) -> None:
    layer = layer_of(tiny, number, dtype)
    hidden = 3 * random(90, 192, dtype=dtype)
    _, gates, choice = layer.mlp.gate(hidden)
    want = Step3p7Experts.forward(layer.mlp.experts, hidden, choice, gates)
    assert torch.equal(run_experts(layer.mlp.experts, hidden, choice, gates, None, nothing), want)


def test_padding_is_not_run_and_experts_come_in_order(tiny: Path) -> None:
    experts = layer_of(tiny, UNLIMITED).mlp.experts
    hidden = random(20, 192)
    choice = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(20)])
    gates = torch.full((20, TOP_K), 0.25)
    real = torch.arange(20) < 15
    seen: list[tuple[int, int]] = []
    found = run_experts(experts, hidden, choice, gates, real, lambda e, x, *_: seen.append((e, len(x))))
    assert torch.equal(found[15:], torch.zeros(5, 192))
    want = Step3p7Experts.forward(experts, hidden[:15], choice[:15], gates[:15])
    assert torch.equal(found[:15], want)
    counts = torch.bincount(choice[:15].flatten(), minlength=EXPERTS).tolist()
    assert seen == [(expert, count) for expert, count in enumerate(counts) if count]


def dense(layer: Step3p7DecoderLayer, hidden: Tensor, limit: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All experts on all tokens: gates [T, E] (0: not chosen), inner [T, E, I], outputs [T, E, H]; in float64."""
    experts, router, x = layer.mlp.experts, layer.mlp.gate, hidden.double()
    score = torch.sigmoid(x @ router.weight.double().t())
    chosen = torch.topk(score + router.e_score_correction_bias.double(), TOP_K).indices
    gates = torch.zeros_like(score).scatter(1, chosen, score.gather(1, chosen))
    gates /= gates.sum(1, keepdim=True)
    gate, up = torch.einsum("th,eih->tei", x, experts.gate_up_proj.double()).chunk(2, dim=-1)
    gate = F.silu(gate)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return x, gates, gate * up, torch.einsum("tei,ehi->teh", gate * up, experts.down_proj.double())


@pytest.mark.parametrize(("number", "limit"), [(LIMITED, ROUTED_LIMIT), (UNLIMITED, None)])
def test_saliency_is_that_of_a_dense_computation(tiny: Path, number: int, limit: float | None) -> None:
    layer = layer_of(tiny, number)
    # A strong bias: were it part of the gates, or had the gates the router's scaling factor, the sums would be off.
    layer.mlp.gate.e_score_correction_bias += random(EXPERTS, seed=1)
    # Large inputs, so that the clamp takes part.
    hidden = 6 * random(2, 150, 192, seed=2)
    real = torch.arange(300) % 150 < torch.tensor([150, 110]).repeat_interleave(150)
    inputs: list[Tensor] = []
    layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)[real]))
    observer = LayerObserver(layer, number)
    observer.start(real, held_out=False)
    run_layer(layer, number, hidden, observer.kv)
    x, gates, inner, outputs = dense(layer, inputs[0], limit)
    norms = outputs.norm(dim=-1)
    chosen = gates > 0
    want = {
        "tokens": chosen.sum(0),
        "gated_norm_sum": (gates * norms).sum(0),
        "norm_sum": (chosen * norms).sum(0),
        "max_activation": torch.where(chosen[..., None], outputs.abs(), 0.0).amax((0, 2)),
    }
    found = observer.saliency
    assert found is not None
    assert found.tokens.tolist() == want["tokens"].tolist()
    assert 0 in found.tokens.tolist()
    for name, values in want.items():
        # float32 against float64
        np.testing.assert_allclose(getattr(found, name), values.numpy(), rtol=1e-5, err_msg=name)
    counts = chosen.sum(0).clamp(min=1)[:, None]
    moments = {
        "gate_proj": torch.einsum("te,th->eh", chosen.double(), x**2) / counts,
        "down_proj": torch.einsum("te,tei->ei", chosen.double(), inner**2) / counts,
    }
    moments["up_proj"] = moments["gate_proj"]
    importance = observer.importance
    for name, wanted in moments.items():
        key = f"model.layers.{number}.moe.{name}.weight"
        # float32 against float64; by the whole, since a single small value may be a difference of large ones
        assert (importance[key] - wanted).norm() <= 1e-5 * wanted.norm(), name
        assert torch.equal(importance[key] == 0, wanted == 0), name


def test_a_closed_observer_lets_go_of_the_layer(tiny: Path) -> None:
    layer = layer_of(tiny, UNLIMITED)
    hidden = random(1, 40, 192)
    want = run_layer(layer, UNLIMITED, hidden)
    observer = LayerObserver(layer, UNLIMITED)
    observer.start(None, held_out=False)
    run_layer(layer, UNLIMITED, hidden, observer.kv)
    before = observer.importance
    observer.close()
    assert torch.equal(run_layer(layer, UNLIMITED, hidden), want)
    assert all(torch.equal(observer.importance[name], values) for name, values in before.items())
    weight = weakref.ref(layer.mlp.experts.gate_up_proj)
    gc.disable()  # a layer is gigabytes: it must not wait for the collector
    try:
        del layer
        assert weight() is None
    finally:
        gc.enable()


def test_held_out_batches_count_for_nothing_but_the_overflows(tiny: Path) -> None:
    layer = layer_of(tiny, UNLIMITED)
    observer = LayerObserver(layer, UNLIMITED, hessians=True)
    observer.start(None, held_out=False)
    run_layer(layer, UNLIMITED, random(1, 40, 192), observer.kv)
    saliency, importance = observer.saliency, observer.importance
    assert observer.kv is not None and saliency is not None
    before = observer.kv.result
    observer.start(None, held_out=True)
    run_layer(layer, UNLIMITED, random(1, 30, 192, seed=5), observer.kv)
    after = observer.kv.result
    assert observer.saliency is not None
    for name, values in vars(saliency).items():
        assert np.array_equal(getattr(observer.saliency, name), values), name
    assert all(torch.equal(observer.importance[name], values) for name, values in importance.items())
    assert before["held_out"]["values"] == 0 and after["held_out"]["values"] == 30 * 2 * 64
    assert {**before, "held_out": None} == {**after, "held_out": None}


def test_matrices_of_a_layer(tiny: Path) -> None:
    layer = layer_of(tiny, UNLIMITED)
    seen: dict[str, Tensor] = {}
    for name in (
        "self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.down_proj",
    ):
        layer.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].flatten(0, -2).double()})
        )
    observer = LayerObserver(layer, UNLIMITED, hessians=True)
    observer.start(None, held_out=False)
    run_layer(layer, UNLIMITED, random(2, 60, 192), observer.kv)
    importance, found = observer.importance, observer.hessians()
    prefix = f"model.layers.{UNLIMITED}."
    keys = {
        "self_attn.input": "self_attn.q_proj",
        "self_attn.o_proj": "self_attn.o_proj",
        "moe.input": "mlp.shared_experts.gate_proj",
        "share_expert.down_proj": "mlp.shared_experts.down_proj",
    }
    assert set(found) == {prefix + key for key in (*keys, "moe.down_proj")}
    for key, module in keys.items():
        want = seen[module].t() @ seen[module] / 120
        assert found[prefix + key].dtype == torch.float32
        assert (found[prefix + key] - want).norm() <= 1e-5 * want.norm(), key
    _, gates, inner, _ = dense(layer, seen["mlp.shared_experts.gate_proj"], None)
    chosen = (gates > 0).double()
    want = torch.einsum("te,tei,tej->eij", chosen, inner, inner) / chosen.sum(0).clamp(min=1)[:, None, None]
    assert found[f"{prefix}moe.down_proj"].shape == (EXPERTS, 64, 64)
    assert (found[f"{prefix}moe.down_proj"] - want).norm() <= 1e-5 * want.norm()
    diagonal = found[f"{prefix}moe.down_proj"].diagonal(dim1=1, dim2=2)
    assert torch.allclose(diagonal, importance[f"{prefix}moe.down_proj.weight"], rtol=1e-5)


def test_moments_are_exact_where_float32_sums_are_not() -> None:
    moments = SecondMoments(2, torch.device("cpu"), experts=2)
    moments.add(torch.tensor([[4096.0, 1.0]]))
    for _ in range(15):
        moments.add(torch.tensor([[1.0, 1.0]]))  # 2^24 + 1 in float32 is 2^24
    assert moments.importance.tolist() == [[float(np.float32((2**24 + 15) / 16)), 1.0], [0.0, 0.0]]
    assert moments.matrices is None


def test_kv_percentiles_are_values_that_occurred() -> None:
    values = random(1, 2, 500, 8, dtype=torch.bfloat16)
    k, v = values, values * 2
    ranges = KvRanges(torch.device("cpu"))
    got_k, got_v = ranges.update(k, v, 0)
    assert got_k is k and got_v is v
    ordered = np.sort(values.float().abs().numpy().ravel())
    found = ranges.result
    for percentile, value in found["k_percentiles"].items():
        want = ordered[int(np.ceil(float(percentile) / 100 * len(ordered))) - 1]
        assert value == want, percentile
        assert found["v_percentiles"][percentile] == 2 * want
    assert found["k_absmax"] == ordered[-1] and found["v_absmax"] == 2 * ordered[-1]


def test_kv_overflows_are_counted_against_the_calibration() -> None:
    ranges = KvRanges(torch.device("cpu"))

    def values(*numbers: float) -> Tensor:
        return torch.tensor(numbers)[None, None, :, None]  # [1, 1, T, 1]

    ranges.real = torch.tensor([True, True, False])
    ranges.update(values(1.0, -2.0, 99.0), values(4.0, 1.0, -99.0), 0)
    ranges.held_out = True
    ranges.real = None
    ranges.update(values(2.0, -2.2, -2.4, 4.5, 1.0), values(4.0, 4.5, -5.5, 8.5, 0.0), 0)
    found = ranges.result
    assert (found["k_absmax"], found["v_absmax"]) == (2.0, 4.0)
    assert found["held_out"] == {
        "values": 5,
        "k_absmax": 4.5,
        "v_absmax": 8.5,
        "k_over": {"1": 3, "1.15": 2, "2": 1},
        "v_over": {"1": 3, "1.25": 2, "2": 1},
    }
