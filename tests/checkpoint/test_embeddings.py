"""What enters the first layer equals what transformers makes of the same tokens and pictures, from the same files."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from transformers import PreTrainedTokenizerFast
from transformers.models.step3p7.configuration_step3p7 import Step3p7VisionConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7ForConditionalGeneration, Step3p7VisionModel
from transformers.models.step3p7.processing_step3p7 import Step3p7Processor

from step128_checkpoint.calibration.building.build import build_samples
from step128_checkpoint.calibration.building.mixture import Mixture, Part
from step128_checkpoint.calibration.embeddings import embed
from step128_checkpoint.calibration.samples import SampleSet, open_samples
from step128_checkpoint.calibration.vision import (
    PROJECTOR,
    VisionTower,
    block,
    image_processor,
    stored_name,
    vision_linears,
)
from step128_checkpoint.cli import main
from step128_checkpoint.dimensions import Dimensions, read_dimensions
from step128_checkpoint.errors import CheckpointError, ConfigurationError
from step128_checkpoint.expected import expected_weights
from step128_checkpoint.header import TensorInfo
from step128_checkpoint.policy import load_policy
from step128_checkpoint.reader import Checkpoint, open_checkpoint
from step128_checkpoint.tiny.config import hub_config
from step128_checkpoint.tiny.corpus import dialogue_texts
from step128_checkpoint.tiny.tokenizer import special_ids, tokenizer_files, train_tokenizer

# float32 sums in another order: batches of four views here, one batch of all there. Features are of order 1.
TOLERANCE = 2e-5


def dimensions_of(config: dict[str, Any]) -> Dimensions:
    """Sizes of the model that a config.json describes; of the tensors only their blocks' numbers matter."""
    blocks = [f"model.layers.{i}.x" for i in range(48)]
    blocks += [f"vision_model.transformer.resblocks.{i}.x" for i in range(config["vision_config"]["layers"])]
    tensors = {name: TensorInfo(name, "BF16", (1,), Path("x"), 0) for name in blocks}
    return read_dimensions(Checkpoint(Path("none"), config, tensors))


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny model's shape in which every number is random: zeros and ones would hide mistakes."""
    folder = tmp_path_factory.mktemp("embeddings") / "random"
    folder.mkdir()
    tokenizer = train_tokenizer(dialogue_texts(2000, seed=0))
    for name, text in tokenizer_files(tokenizer).items():
        (folder / name).write_text(text)
    ids = special_ids(tokenizer)
    config = hub_config(image_token_id=ids.image, bos_token_id=ids.begin, eos_token_ids=ids.stop)
    (folder / "config.json").write_text(json.dumps(config))
    dimensions = dimensions_of(config)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in expected_weights(dimensions, dimensions.num_mtp_layers):
        inputs = math.prod(shape[1:]) if len(shape) > 1 else 10
        tensors[name] = (torch.randn(shape, generator=generator) / math.sqrt(inputs)).to(torch.bfloat16)
    save_torch(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def whole(random_model: Path) -> Step3p7ForConditionalGeneration:
    return Step3p7ForConditionalGeneration.from_pretrained(random_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def samples(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleSet:
    """Texts and conversations with one and several pictures, some of them cut into crops."""
    parts = (
        Part("chat", "chat", "builtin:conversations", 1),
        Part("one", "images", "builtin:pictures", 2),
        Part("many", "multi_image", "builtin:pictures", 1),
    )
    out = tmp_path_factory.mktemp("samples") / "set"
    return build_samples(Mixture("test", parts), random_model, out, samples=8, tokens_per_sample=1024, seed=3)


def pictures() -> list[Image.Image]:
    """Noise of three sizes: whole only, with a row of crops, and with a grid of them."""
    noise = np.random.default_rng(0)
    return [
        Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in ((160, 200), (300, 700), (900, 800))
    ]


def test_features_are_those_of_the_whole_model(random_model: Path, whole: Step3p7ForConditionalGeneration) -> None:
    inputs = image_processor(whole.config.to_dict())(images=pictures(), return_tensors="pt")
    assert inputs["num_local_patches"].tolist() == [0, 3, 4]
    with torch.inference_mode():
        expected = torch.cat(
            whole.get_image_features(**{k: v for k, v in inputs.items() if k != "patch_newline_masks"}).pooler_output
        )
    with open_checkpoint(random_model) as checkpoint:
        found = VisionTower(checkpoint, torch.float32, "cpu").features(pictures())
    assert found.shape == (3 * 169 + 7 * 81, 192)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_inputs_are_those_that_the_model_makes(
    random_model: Path, whole: Step3p7ForConditionalGeneration, samples: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = Step3p7Processor(
        image_processor(whole.config.to_dict()), PreTrainedTokenizerFast.from_pretrained(random_model)
    )
    captured: list[torch.Tensor] = []

    def capture(inputs_embeds: torch.Tensor, **_: object) -> None:
        captured.append(inputs_embeds[0])
        raise InterruptedError

    monkeypatch.setattr(whole.model.language_model, "forward", capture)
    several = 0
    with open_checkpoint(random_model) as checkpoint:
        for number, hidden in embed(checkpoint, samples, range(len(samples)), "cpu", torch.float32):
            paths = samples.images(number)
            several += len(paths) >= 2
            inputs = {}
            if paths:
                inputs = dict(
                    processor.image_processor(images=[Image.open(path) for path in paths], return_tensors="pt")
                )
                inputs.pop("patch_newline_masks", None)
            ids = torch.from_numpy(samples.token_ids(number).astype(np.int64))[None]
            with torch.inference_mode(), pytest.raises(InterruptedError):
                whole.model(input_ids=ids, **inputs)
            torch.testing.assert_close(hidden, captured.pop(), atol=TOLERANCE, rtol=TOLERANCE)
    assert several >= 2


def test_moments_are_those_of_the_linears_inputs(
    random_model: Path, whole: Step3p7ForConditionalGeneration, samples: SampleSet
) -> None:
    """Every weight that a policy quantizes in the tower, over calibration samples only."""
    expected: dict[str, torch.Tensor] = {}
    rows: dict[str, int] = {}

    def hook(name: str) -> object:
        def add(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            flat = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            expected[name] = expected.get(name, torch.zeros(flat.shape[1])) + (flat**2).sum(0)
            rows[name] = rows.get(name, 0) + len(flat)

        return add

    handles = [whole.model.multi_modal_projector.register_forward_pre_hook(hook("vit_large_projector.weight"))]
    for i, layer in enumerate(whole.model.vision_model.layers):
        block = f"vision_model.transformer.resblocks.{i}"
        for module, name in (
            (layer.self_attn.v_proj, "attn.in_proj_weight"),
            (layer.self_attn.out_proj, "attn.out_proj.weight"),
            (layer.mlp.fc1, "mlp.c_fc.weight"),
            (layer.mlp.fc2, "mlp.c_proj.weight"),
        ):
            handles.append(module.register_forward_pre_hook(hook(f"{block}.{name}")))
    processor = image_processor(whole.config.to_dict())
    for number in range(len(samples)):
        if samples.images(number) and not samples.held_out[number]:
            inputs = processor(images=[Image.open(path) for path in samples.images(number)], return_tensors="pt")
            inputs.pop("patch_newline_masks", None)
            with torch.inference_mode():
                whole.get_image_features(**inputs)
    for handle in handles:
        handle.remove()
    assert any(samples.images(i) for i in np.flatnonzero(samples.held_out)), "the test needs a held-out picture"

    found: list[dict[str, torch.Tensor]] = []
    with open_checkpoint(random_model) as checkpoint:
        list(embed(checkpoint, samples, range(len(samples)), "cpu", torch.float32, found.append))
        policy = load_policy("all")
        quantized = {
            n for n in checkpoint.tensors if policy.component_of(n, checkpoint.num_hidden_layers) == "vision_linears"
        }
    (moments,) = found
    assert set(moments) == set(expected) == quantized
    for name, values in moments.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, (expected[name] / rows[name]).float(), atol=0, rtol=1e-4)


def test_quantized_checkpoint_is_embedded_as_its_dequantized_weights(
    random_model: Path, samples: SampleSet, tmp_path: Path
) -> None:
    """NL4 embeddings and tower: row by row the same numbers as those of the checkpoint written out."""
    quantize = ["quantize", str(random_model), str(tmp_path / "nl4"), "--policy", "all", "--method", "absmax"]
    assert main([*quantize, "--jobs", "1"]) == 0
    assert main(["dequantize", str(tmp_path / "nl4"), str(tmp_path / "plain"), "--jobs", "1"]) == 0
    number = next(i for i in range(len(samples)) if samples.images(i))
    results = []
    for name in ("nl4", "plain"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            results += [hidden for _, hidden in embed(checkpoint, samples, [number], "cpu", torch.float32)]
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)


def test_bfloat16_differs_by_its_rounding_only(random_model: Path, samples: SampleSet) -> None:
    number = next(i for i in range(len(samples)) if samples.images(i))
    with open_checkpoint(random_model) as checkpoint:
        ((_, exact),) = embed(checkpoint, samples, [number], "cpu", torch.float32)
        ((_, rounded),) = embed(checkpoint, samples, [number], "cpu", torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    # Eight significant bits, through two blocks and two convolutions.
    assert float((rounded.float() - exact).norm() / exact.norm()) < 0.02


def test_text_needs_no_tower(random_model: Path, samples: SampleSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step128_checkpoint.calibration.vision.VisionTower", lambda *_: pytest.fail("loaded"))
    numbers = [i for i in range(len(samples)) if not samples.images(i)]
    moments: list[object] = []
    with open_checkpoint(random_model) as checkpoint:
        assert len(list(embed(checkpoint, samples, numbers, "cpu", torch.float32, moments.append))) == len(numbers) > 0
    assert not moments


def test_every_tensor_of_the_real_tower_has_its_place() -> None:
    """Names and shapes of the 170B checkpoint's tower, from its config.json: each is used once, none is left over."""
    config = json.loads((Path(__file__).parents[1] / "data/step-3.7-flash-240/config.json").read_text())
    vision = Step3p7VisionConfig(
        **{key: value for key, value in config["vision_config"].items() if key != "model_type"}
    )
    with torch.device("meta"):
        tower = Step3p7VisionModel(vision)
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in tower.state_dict().items():
        shape = tuple(tensor.shape)
        if part := re.fullmatch(r"layers\.(\d+)\.self_attn\.[qkv]_proj\.(weight|bias)", name):
            stored, shape = f"{block(int(part[1]))}.attn.in_proj_{part[2]}", (3 * shape[0], *shape[1:])
            assert found.get(stored, shape) == shape
        else:
            stored = stored_name(name)
            assert stored not in found
        found[stored] = shape
    expected = dict(expected_weights(dimensions_of(config), 0))
    assert found == {name: shape for name, shape in expected.items() if name.startswith("vision_model.")}
    policy = load_policy("all")
    quantized = {name for name in expected if policy.component_of(name, 45) == "vision_linears"}
    assert {name for _, name in vision_linears(tower)} | {PROJECTOR} == quantized


def test_torchvision_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: object, **__: object) -> None:
        raise ImportError("Step3p7ImageProcessor requires the Torchvision library")

    monkeypatch.setattr("step128_checkpoint.calibration.vision.Step3p7ImageProcessor", unavailable)
    with pytest.raises(ConfigurationError, match="pictures need the package torchvision"):
        image_processor({})


def copy_of(samples: SampleSet, out: Path) -> Path:
    shutil.copytree(samples.folder, out)
    return out


def rewrite(folder: Path, **changed: np.ndarray) -> SampleSet:
    """Put other token ids into a set, with the right hash."""
    path = folder / "token_ids.safetensors"
    save_file({**load_file(path), **changed}, path)
    document = json.loads((folder / "samples.json").read_text())
    document["files"]["token_ids.safetensors"] = hashlib.sha256(path.read_bytes()).hexdigest()
    document["vocabulary"] = 1 << 20
    (folder / "samples.json").write_text(json.dumps(document))
    return open_samples(folder)


def test_a_picture_too_few_or_a_foreign_token_is_an_error(
    random_model: Path, samples: SampleSet, tmp_path: Path
) -> None:
    number = next(i for i in range(len(samples)) if samples.images(i))
    ids = load_file(samples.folder / "token_ids.safetensors")["token_ids"]
    image_token = json.loads((random_model / "config.json").read_text())["image_token_id"]
    first = int(np.flatnonzero(ids == image_token)[0])
    with open_checkpoint(random_model) as checkpoint:
        fewer = rewrite(
            copy_of(samples, tmp_path / "fewer"),
            token_ids=np.where(np.arange(len(ids)) == first, 5, ids).astype(np.int32),
        )
        with pytest.raises(CheckpointError, match="places for pictures, but the model makes"):
            list(embed(checkpoint, fewer, range(len(fewer)), "cpu", torch.float32))
        foreign = rewrite(copy_of(samples, tmp_path / "foreign"), token_ids=np.full_like(ids, 5000))
        with pytest.raises(CheckpointError, match=r"token id 5000 is outside this model's vocabulary of 2048"):
            list(embed(checkpoint, foreign, [number], "cpu", torch.float32))


def test_a_broken_tower_is_named(random_model: Path, samples: SampleSet, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(random_model, broken)
    tensors = load_torch(broken / "model.safetensors")
    del tensors["vision_model.transformer.resblocks.1.mlp.c_fc.weight"]
    save_torch(tensors, broken / "model.safetensors")
    number = random.Random(0).choice([i for i in range(len(samples)) if samples.images(i)])
    with (
        open_checkpoint(broken) as checkpoint,
        pytest.raises(CheckpointError, match=r"resblocks\.1\.mlp\.c_fc\.weight"),
    ):
        list(embed(checkpoint, samples, [number], "cpu", torch.float32))
