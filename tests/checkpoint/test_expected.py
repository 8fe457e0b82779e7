"""A checkpoint that contradicts its config.json is refused before any work, and `inspect` says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from step128_checkpoint.cli import main
from step128_checkpoint.dimensions import read_dimensions
from step128_checkpoint.expected import expected_weights
from step128_checkpoint.header import TensorInfo
from step128_checkpoint.reader import Checkpoint
from step128_checkpoint.tiny.config import hub_config
from step128_launcher.configs_dir import find_configs_dir
from step128_launcher.model.model_config import read_model_config
from step128_launcher.model.quantization import read_format
from step128_launcher.model.tensors import expected_tensors

MakeCheckpoint = Callable[..., Path]
SCALE = r"self_attn\.{}_proj\.{}_scale"


def both_refuse(source: Path, capsys: pytest.CaptureFixture[str], *messages: str) -> None:
    """`quantize` ends with 65 and writes nothing; `inspect` ends with 65; both say the same."""
    capsys.readouterr()
    assert main(["quantize", "--method", "mse", str(source), str(source.parent / "out")]) == 65
    refused = capsys.readouterr().err
    assert not list(source.parent.glob("out*"))
    assert main(["inspect", str(source), "--json"]) == 65
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    for message in messages:
        assert message in refused
        assert message in " ".join(found.get("problems") or [found.get("error")])


def test_launcher_expects_the_same_weights(tmp_path: Path) -> None:
    config = hub_config(image_token_id=1, bos_token_id=2, eos_token_ids=[3])
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_model_config(tmp_path)
    theirs = {t.name: t.shape for t in expected_tensors(model, read_format(find_configs_dir()), None).values()}
    tensors = {name: TensorInfo(name, "BF16", shape, tmp_path / "x", 0) for name, shape in theirs.items()}
    dimensions = read_dimensions(Checkpoint(tmp_path, config, tensors))
    assert dict(expected_weights(dimensions, dimensions.num_mtp_layers)) == theirs


def test_missing_and_unknown_weights(make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint(drop=r"^model\.norm\.weight|layers\.2\.moe\.up_proj")
    both_refuse(source, capsys, "2 of", "tensors are missing: model.layers.2.moe.up_proj.weight, model.norm.weight")


def test_unknown_weight(
    make_checkpoint: MakeCheckpoint, step_model: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint(shapes=step_model()[1] | {"model.layers.1.mlp.up_proj.weight": (32, 64)})
    both_refuse(source, capsys, "1 tensors that this model does not have: model.layers.1.mlp.up_proj.weight")


def test_wrong_shape(make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint(replace={"lm_head.weight": np.ones((95, 64), np.float32)})
    both_refuse(source, capsys, "tensor lm_head.weight has shape [95, 64]; config.json makes it [96, 64]")


def test_checkpoint_without_mtp_is_fine(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(drop=r"layers\.3\.")
    assert main(["inspect", str(source)]) == 0
    assert main(["quantize", "--method", "mse", str(source), str(tmp_path / "out")]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert not {"mtp_linears", "mtp_heads"} & set(entry["quantized_components"])


def test_incomplete_mtp_is_refused(make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    both_refuse(make_checkpoint(drop=r"layers\.3\.eh_proj"), capsys, "model.layers.3.eh_proj.weight")


@pytest.mark.parametrize("drop", [r"_scale$", r"layers\.3\.self_attn\.[kv]_proj\.[kv]_scale"])
def test_kv_scales_may_be_absent(make_checkpoint: MakeCheckpoint, tmp_path: Path, drop: str) -> None:
    """Altogether, or in the MTP layers: that is the published 240-expert checkpoint."""
    source = make_checkpoint(drop=drop)
    assert main(["inspect", str(source)]) == 0
    assert main(["quantize", "--method", "mse", str(source), str(tmp_path / "out")]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("drop", "missing"),
    [
        (r"layers\.1\..*_scale", "model.layers.1.self_attn.k_proj.k_scale is missing (2 of 6 in the trunk"),
        (r"v_scale", "model.layers.0.self_attn.v_proj.v_scale is missing (3 of 6 in the trunk"),
        (r"layers\.3\..*v_scale", "model.layers.3.self_attn.v_proj.v_scale is missing (1 of 2 in the MTP"),
        (r"layers\.[012]\..*_scale", "model.layers.0.self_attn.k_proj.k_scale is missing (6 of 6 in the trunk"),
    ],
)
def test_kv_scales_must_be_complete(
    make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], drop: str, missing: str
) -> None:
    both_refuse(make_checkpoint(drop=drop), capsys, missing)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (None, "architectures", "Step3p7ForConditionalGeneration"),
        (None, "text_config", None),
        ("text_config", "hidden_size", None),
        ("text_config", "num_hidden_layers", None),
        ("text_config", "num_hidden_layers", True),
        ("text_config", "num_hidden_layers", 10**9),
        ("text_config", "num_nextn_predict_layers", 10**9),
        ("text_config", "moe_layers_enum", "1,two"),
        ("text_config", "moe_layers_enum", [1, 2]),
        ("text_config", "moe_layers_enum", "1,3"),
        ("text_config", "layer_types", ["full_attention"]),
        ("vision_config", "layers", 10**9),
        ("vision_config", "mlp_ratio", float("nan")),
    ],
)
def test_config_that_makes_no_sense(
    make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], section: str | None, key: str, value: object
) -> None:
    source = make_checkpoint()
    config = json.loads((source / "config.json").read_text())
    (config[section] if section else config)[key] = value
    (source / "config.json").write_text(json.dumps(config))
    both_refuse(source, capsys, "config.json", key if key != "num_nextn_predict_layers" else "layer_types")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"moe_top_k": 5}, "text_config.moe_top_k is 5; a token cannot have more experts than there are, 4"),
        ({"moe_top_k": "2"}, "text_config.moe_top_k is '2'; a whole number of at least 1 is needed"),
        ({"sliding_window": None}, "text_config.sliding_window is None; a whole number of at least 1 is needed"),
        ({"sliding_window": 1.5}, "text_config.sliding_window is 1.5; a whole number of at least 1 is needed"),
    ],
)
def test_numbers_that_no_layer_can_run_with(
    make_checkpoint: MakeCheckpoint, text: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint(**text)
    both_refuse(source, capsys, message)
    assert main(["verify", str(source), "--json"]) == 65
    assert message in " ".join(json.loads(capsys.readouterr().out)["problems"])
