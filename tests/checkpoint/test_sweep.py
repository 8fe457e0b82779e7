"""The whole sweep's figures, against those of transformers' whole model and of the pruned checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from sample_sets import HELD_OUT, LENGTHS, tiny_ids, write_samples
from torch import Tensor
from transformers import DynamicCache, Step3p7ForConditionalGeneration

from step128_checkpoint.calibration.embeddings import embed
from step128_checkpoint.calibration.match import check_match
from step128_checkpoint.calibration.needs import calibrated_weights
from step128_checkpoint.calibration.options import CalibrationOptions
from step128_checkpoint.calibration.plan import make_plan
from step128_checkpoint.calibration.result import hessian_key, open_calibration
from step128_checkpoint.calibration.samples import open_samples
from step128_checkpoint.calibration.sweep import CalibrationSummary, calibrate
from step128_checkpoint.conversion import convert
from step128_checkpoint.dimensions import layer_of
from step128_checkpoint.pruning.decide import decided_by
from step128_checkpoint.pruning.prune import plan_pruning
from step128_checkpoint.reader import open_checkpoint
from step128_checkpoint.tiny.reference import load_model

COUNTED = sum(length for number, length in enumerate(LENGTHS) if number not in HELD_OUT)
MOE_LAYERS, MTP_LAYERS, EXPERTS, KEEP = range(3, 9), range(9, 12), 16, 11


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ids(tiny: Path) -> list[np.ndarray]:
    return tiny_ids(tiny)


class RecordingCache(DynamicCache):
    """Keeps |K| and |V| of every layer, as a cache stores them."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[tuple[int, str], float] = {}

    def update(self, k: Tensor, v: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for kind, values in (("k", k), ("v", v)):
            self.largest[layer, kind] = float(values.abs().max())
        return super().update(k, v, layer, *args, **kwargs)


@pytest.fixture(scope="module")
def direct(tiny: Path, ids: list[np.ndarray]) -> tuple[dict[str, Tensor], dict[tuple[int, str], float]]:
    """E[x^2] by weight name and the largest K and V of transformers' whole model, sample by sample, in float32."""
    model = Step3p7ForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32)
    sums: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}

    def add(name: str, squares: Tensor, count: Tensor) -> None:
        sums[name], rows[name] = sums.get(name, 0) + squares, rows.get(name, 0) + count

    def watch(module: torch.nn.Module, names: list[str]) -> None:
        def see(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].flatten(0, -2).double()
            for name in names:
                add(name, (x**2).sum(0), torch.tensor(len(x)))

        module.register_forward_pre_hook(see)

    def watch_experts(module: torch.nn.Module, prefix: str) -> None:
        def see(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            x, choice, _ = inputs
            for expert in range(EXPERTS):
                mine = x[(choice == expert).any(1)]
                inner = module._apply_gate(mine @ module.gate_up_proj[expert].t())
                for part, values in (("gate", mine), ("up", mine), ("down", inner)):
                    squares = torch.zeros(EXPERTS, values.shape[1], dtype=torch.float64)
                    squares[expert] = (values.double() ** 2).sum(0)
                    count = torch.zeros(EXPERTS, 1)
                    count[expert] = len(mine)
                    add(f"{prefix}moe.{part}_proj.weight", squares, count)

        module.register_forward_pre_hook(see)

    for number, layer in enumerate(model.model.language_model.layers):
        prefix = f"model.layers.{number}."
        for part in "qkvo":
            name = f"self_attn.{part}_proj"
            watch(layer.get_submodule(name), [f"{prefix}{name}.weight"])
        dense = number not in MOE_LAYERS
        if not dense:
            watch_experts(layer.mlp.experts, prefix)
        for part in ("gate", "up", "down"):
            mlp, name = (layer.mlp, "mlp") if dense else (layer.mlp.shared_experts, "share_expert")
            watch(mlp.get_submodule(f"{part}_proj"), [f"{prefix}{name}.{part}_proj.weight"])
    watch(model.lm_head, ["lm_head.weight"])
    largest: dict[tuple[int, str], float] = {}
    for number, tokens in enumerate(ids):
        if number not in HELD_OUT:
            cache = RecordingCache()
            with torch.no_grad():
                model(input_ids=torch.from_numpy(tokens)[None], past_key_values=cache)
            for key, value in cache.largest.items():
                largest[key] = max(largest.get(key, 0.0), value)
    return {name: total / rows[name].clamp(min=1) for name, total in sums.items()}, largest


def test_importance_and_kv_ranges_are_those_of_the_whole_model(
    options: CalibrationOptions, direct: tuple[dict[str, Tensor], dict[tuple[int, str], float]]
) -> None:
    importance, largest = direct
    calibrate(replace(options, dtype="float32"))
    found = open_calibration(options.out)
    measured = load_file(found.importance_path)
    weights = calibrated_weights(make_plan(options))
    assert set(measured) == set(weights)
    assert set(importance) == {name for name in weights if layer_of(name) not in MTP_LAYERS}
    for name, shape in weights.items():
        assert measured[name].dtype == np.float32
        assert measured[name].shape == (shape[-1:] if len(shape) == 2 else (shape[0], shape[2])), name
    for name, want in importance.items():
        # float32 hidden states, in batches and one by one; by the whole, since small values may be differences
        assert np.linalg.norm(measured[name] - want.numpy()) <= 1e-4 * np.linalg.norm(want.numpy()), name
    ranges = found.kv_ranges
    assert set(ranges) == set(range(12))
    for (layer, kind), value in largest.items():
        assert getattr(ranges[layer], f"{kind}_absmax") == pytest.approx(value, rel=1e-4), (layer, kind)
    for layer in MOE_LAYERS:
        assert found.saliency()[layer].tokens.sum() == 4 * COUNTED
    assert found.document["samples"]["tokens"] == COUNTED and found.document["pruned"] is None


def test_mtp_layers_are_measured_along_the_proposers_chain(
    options: CalibrationOptions, tiny: Path, ids: list[np.ndarray]
) -> None:
    network = load_model(tiny)
    sums: dict[str, Tensor] = {}
    largest: dict[tuple[int, str], float] = {}
    rows = [0, 0, 0]

    def square(name: str, values: Tensor) -> None:
        sums[name] = sums.get(name, 0) + (values.double() ** 2).sum(0)

    seen: dict[str, Tensor] = {}
    for layer in network.mtp_layers:
        for name, module in (("self_attn.o_proj", layer.self_attn.o_proj), ("mlp.down_proj", layer.mlp.down_proj)):
            key = f"model.layers.{layer.self_attn.layer.index}.{name}.weight"
            module.register_forward_pre_hook(lambda _, inputs, key=key: seen.update({key: inputs[0][0]}))
        layer.self_attn.kv_observer = lambda i, k, v: seen.update({f"{i}.k": k[0], f"{i}.v": v[0]})
    for number, tokens in enumerate(ids):
        if number in HELD_OUT:
            continue
        embedded = network.embed(torch.from_numpy(tokens)[None].long())
        states = network.draft_hidden(network.trunk(embedded)[:, :-1], embedded[:, 1:])
        for k, state in enumerate(states):
            index = 9 + k
            rows[k] += len(tokens) - 1 - k
            prefix = f"model.layers.{index}."
            square(f"{prefix}transformer.shared_head.output.weight", network.mtp_layers[k].head.norm(state)[0, k:])
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                square(f"{prefix}{name}.weight", seen[f"{prefix}{name}.weight"][k:])
            for kind in "kv":
                value = float(seen[f"{index}.{kind}"][k:].abs().max())
                largest[index, kind] = max(largest.get((index, kind), 0.0), value)
    calibrate(replace(options, dtype="float32"))
    found = open_calibration(options.out)
    measured = load_file(found.importance_path)
    for name, total in sums.items():
        want = (total / rows[int(name.split(".")[2]) - 9]).numpy()
        assert np.linalg.norm(measured[name] - want) <= 1e-4 * np.linalg.norm(want), name
    for (layer, kind), value in largest.items():
        assert getattr(found.kv_ranges[layer], f"{kind}_absmax") == pytest.approx(value, rel=1e-4), (layer, kind)


def test_the_batch_size_decides_nothing_but_rounding(options: CalibrationOptions, tmp_path: Path) -> None:
    one, many = replace(options, dtype="float32", batch_tokens=1), replace(options, dtype="float32", out=tmp_path / "2")
    calibrate(one)
    calibrate(many)
    found = [load_file(open_calibration(option.out).importance_path) for option in (one, many)]
    for name, values in found[0].items():
        assert np.linalg.norm(found[1][name] - values) <= 1e-4 * np.linalg.norm(values), name


@pytest.fixture(scope="module")
def pruned(tiny: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CalibrationSummary]:
    """A calibration that prunes, never interrupted."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("pruned") / "cal"
    options = CalibrationOptions(tiny, samples, out, keep=KEEP, hessians=True, device="cpu", batch_tokens=300)
    return out, calibrate(options)


def test_pruning_on_the_way_measures_the_pruned_model(
    options: CalibrationOptions, pruned: tuple[Path, CalibrationSummary], tiny: Path, tmp_path: Path
) -> None:
    folder, _ = pruned
    found = open_calibration(folder)
    kept = found.kept_experts
    assert kept is not None and set(kept) == set(MOE_LAYERS)
    assert all(len(set(experts)) == KEEP and list(experts) == sorted(experts) for experts in kept.values())
    importance = load_file(found.importance_path)
    for layer in MOE_LAYERS:
        assert importance[f"model.layers.{layer}.moe.gate_proj.weight"].shape == (KEEP, 192)
        assert importance[f"model.layers.{layer}.moe.down_proj.weight"].shape == (KEEP, 64)
        assert len(found.saliency()[layer].tokens) == EXPERTS
    for layer, expert in found.document["pruned"]["super_experts"]:
        assert expert in kept[layer]
    # The same checkpoint, pruned on disk by what the sweep decided, gives the same figures, bit for bit.
    source = open_checkpoint(tiny)
    conversion = plan_pruning(source, decided_by(source, found))
    convert(conversion, tmp_path / "small", jobs=1, restart=False, on_progress=lambda done: None)
    check_match(open_checkpoint(tmp_path / "small"), found)
    calibrate(replace(options, checkpoint=tmp_path / "small", hessians=True))
    again = open_calibration(options.out)
    assert again.importance_path.read_bytes() == found.importance_path.read_bytes()
    assert again.document["kv"] == found.document["kv"]
    for path in (folder / "hessians").iterdir():
        assert (options.out / "hessians" / path.name).read_bytes() == path.read_bytes(), path.name


def test_hessians_have_an_entry_for_every_input(pruned: tuple[Path, CalibrationSummary], tiny: Path) -> None:
    folder, _ = pruned
    paths = sorted((folder / "hessians").iterdir())
    assert [path.name for path in paths] == [f"layer-{i:05d}.safetensors" for i in range(12)] + ["lm_head.safetensors"]
    found: dict[str, np.ndarray] = {}
    for path in paths:
        found |= load_file(path)
    importance = load_file(folder / "importance.safetensors")
    assert set(found) == {hessian_key(name) for name in importance}
    for name, values in importance.items():
        diagonal = np.diagonal(found[hessian_key(name)], axis1=-2, axis2=-1)
        if ".moe.gate" in name or ".moe.up" in name:
            continue  # these experts share the layer's
        np.testing.assert_allclose(diagonal, values, rtol=1e-5, atol=1e-12, err_msg=name)
    document = json.loads((folder / "calibration.json").read_text())
    assert set(document["files"]) == {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}


def test_pictures_take_part(tiny: Path, ids: list[np.ndarray], tmp_path: Path) -> None:
    placeholder = json.loads((tiny / "config.json").read_text())["image_token_id"]
    folder = tmp_path / "samples"
    (folder / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (728, 728, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "0.png")
    with_picture = np.concatenate([ids[1], np.full(169, placeholder), ids[4]])
    write_samples(folder, [ids[0], with_picture], images={1: ["images/0.png"]})
    options = CalibrationOptions(tiny, folder, tmp_path / "cal", device="cpu", dtype="float32")
    calibrate(options)
    found = open_calibration(options.out)
    measured = load_file(found.importance_path)
    tower: dict[str, Tensor] = {}
    with open_checkpoint(tiny) as checkpoint:
        embedded = dict(embed(checkpoint, open_samples(folder), [0, 1], "cpu", torch.float32, tower.update))
    assert len(tower) > 4
    for name, values in tower.items():
        assert np.array_equal(measured[name], values.numpy()), name
    squares = sum((load_norm_input(tiny, rows) ** 2).sum(0) for rows in embedded.values())
    want = squares / sum(len(rows) for rows in embedded.values())
    np.testing.assert_allclose(measured["model.layers.0.self_attn.q_proj.weight"], want, rtol=1e-4)


def load_norm_input(tiny: Path, rows: Tensor) -> np.ndarray:
    """What the first layer's norm makes of its inputs."""
    weight = load_model(tiny).model.layers[0].input_layernorm.weight
    wide = rows.double()
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + weight)).numpy()


def test_a_quantized_checkpoint_can_be_calibrated(
    options: CalibrationOptions, quantized: Callable[..., Path], dequantized: Callable[..., Path], tmp_path: Path
) -> None:
    packed = replace(options, checkpoint=quantized(), dtype="float32")
    plain = replace(options, checkpoint=dequantized(), dtype="float32", out=tmp_path / "plain")
    calibrate(packed)
    calibrate(plain)
    names = ("importance.safetensors", "saliency.safetensors")
    assert all((packed.out / name).read_bytes() == (plain.out / name).read_bytes() for name in names)
    assert open_calibration(packed.out).document["kv"] == open_calibration(plain.out).document["kv"]
