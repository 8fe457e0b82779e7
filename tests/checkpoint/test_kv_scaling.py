"""KV scales from calibrated ranges: their values, the bound that K's norm sets, and where a product's come from."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from step128_checkpoint.calibration.result import open_calibration
from step128_checkpoint.cli import main
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.kv_scaling import k_bound, kv_scales, overflow_summary
from step128_checkpoint.manifest import headers_sha256
from step128_checkpoint.reader import open_checkpoint

MakeCheckpoint = Callable[..., Path]
LAYERS = range(4)  # three of the trunk, one MTP layer


def calibration_of(source: Path, folder: Path, largest_k: float = 1.5) -> Path:
    """A calibration folder of a checkpoint, with ranges that are easy to follow: K 1.5, V 2 + layer."""
    folder.mkdir()
    save_file({"lm_head.weight": np.ones(64, np.float32)}, folder / "importance.safetensors")
    save_file({"layers.1.tokens": np.ones(4, np.int64)}, folder / "saliency.safetensors")
    held_out = {"values": 100, "k_absmax": 1.6, "v_absmax": 2.0}
    held_out |= {"k_over": {"1": 3, "1.15": 0, "2": 0}, "v_over": {"1": 0, "1.25": 0, "2": 0}}
    rows = {str(n): {"k_absmax": largest_k, "v_absmax": 2.0 + n, "held_out": held_out} for n in LAYERS}
    document: dict[str, Any] = {
        "format": "step128-calibration",
        "format_version": 1,
        "checkpoint": {"name": source.name, "headers_sha256": headers_sha256(open_checkpoint(source))},
        "pruned": None,
        "kv": {"layers": rows},
        "files": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in ("importance.safetensors", "saliency.safetensors")
        },
    }
    (folder / "calibration.json").write_text(json.dumps(document))
    return folder


def scales_of(folder: Path) -> dict[str, float]:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name, file_name in weight_map.items():
        if name.endswith(("k_scale", "v_scale")):
            assert file_name == "model-kvscales.safetensors"
            with safe_open(folder / file_name, "np") as file:
                value = file.get_tensor(name)
            assert (value.dtype, value.shape) == (np.float32, (1,))
            found[name] = float(value[0])
    return found


def quantize(source: Path, out: Path, *options: str | Path) -> int:
    return main(["quantize", "--method", "mse", str(source), str(out), *map(str, options)])


def test_scales_are_the_largest_value_with_headroom_over_448(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(drop="[kv]_scale$")
    calibration = calibration_of(source, tmp_path / "cal")
    assert quantize(source, tmp_path / "default", "--calibration", calibration) == 0
    found = scales_of(tmp_path / "default")
    assert len(found) == 2 * len(LAYERS)
    for layer in LAYERS:
        prefix = f"model.layers.{layer}.self_attn"
        assert found[f"{prefix}.k_proj.k_scale"] == np.float32(1.5 * 1.15 / 448)
        assert found[f"{prefix}.v_proj.v_scale"] == np.float32((2.0 + layer) * 1.25 / 448)
    options = ("--calibration", calibration, "--k-headroom", "2", "--v-headroom", "1")
    assert quantize(source, tmp_path / "other", *options) == 0
    assert scales_of(tmp_path / "other")["model.layers.0.self_attn.k_proj.k_scale"] == np.float32(3.0 / 448)
    assert scales_of(tmp_path / "other")["model.layers.0.self_attn.v_proj.v_scale"] == np.float32(2.0 / 448)
    assert main(["inspect", str(tmp_path / "default")]) == 0
    report = json.loads((tmp_path / "default" / "quantization_report.json").read_text())["kv_scales"]
    assert report["headroom"] == {"k": 1.15, "v": 1.25}
    assert report["held_out_overflows"]["k"]["1"] == {"layers": 4, "values": 12}


def test_scales_of_the_input_are_kept_unless_asked_otherwise(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    calibration = calibration_of(source, tmp_path / "cal")
    before = scales_of(source)
    assert quantize(source, tmp_path / "kept", "--calibration", calibration) == 0
    assert scales_of(tmp_path / "kept") == before
    assert quantize(source, tmp_path / "new", "--calibration", calibration, "--kv-scales", "calibrated") == 0
    assert scales_of(tmp_path / "new").keys() == before.keys()
    assert scales_of(tmp_path / "new")["model.layers.0.self_attn.k_proj.k_scale"] == np.float32(1.5 * 1.15 / 448)
    assert quantize(source, tmp_path / "none", "--kv-scales", "none") == 0
    assert scales_of(tmp_path / "none") == {}
    assert quantize(source, tmp_path / "impossible", "--kv-scales", "calibrated") == 78
    # A headroom for scales that are not made here would do nothing.
    assert quantize(source, tmp_path / "idle", "--calibration", calibration, "--k-headroom", "8") == 78


def test_mtp_layers_that_are_not_there_get_none(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(drop=r"[kv]_scale$|model\.layers\.3\.")
    assert quantize(source, tmp_path / "out", "--calibration", calibration_of(source, tmp_path / "cal")) == 0
    assert {int(name.split(".")[2]) for name in scales_of(tmp_path / "out")} == {0, 1, 2}


def test_k_beyond_what_the_norm_allows_is_another_models(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = np.linspace(-3.0, 0.5, 16, dtype=np.float32)  # 1 + w runs from -2 to 1.5
    norms = {f"model.layers.{n}.self_attn.k_norm.weight": weight for n in LAYERS}
    source = make_checkpoint(replace=norms, drop="[kv]_scale$")
    checkpoint = open_checkpoint(source)
    with checkpoint:
        assert k_bound(checkpoint, 1) == 4 * 2.0
    calibration = calibration_of(source, tmp_path / "low", largest_k=7.9)
    assert kv_scales(checkpoint, open_calibration(calibration))
    calibration = calibration_of(source, tmp_path / "high", largest_k=8.5)
    assert quantize(source, tmp_path / "out", "--calibration", calibration) == 65
    error = capsys.readouterr().err
    assert "K of layer 0 reached 8.5" in error
    assert "no more than 8" in error


def test_overflows_are_counted_by_headroom(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    found = overflow_summary(open_calibration(calibration_of(make_checkpoint(), tmp_path / "cal")))
    assert (found["layers"], found["values"]) == (4, 400)
    assert found["k"] == {
        "1": {"layers": 4, "values": 12},
        "1.15": {"layers": 0, "values": 0},
        "2": {"layers": 0, "values": 0},
    }
    assert found["v"]["1"]["layers"] == 0


def test_calibration_of_another_checkpoint_and_damage_are_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint()
    calibration = calibration_of(make_checkpoint("other", share_expert_dim=32), tmp_path / "cal")
    assert quantize(source, tmp_path / "out", "--calibration", calibration) == 65
    assert "made of the checkpoint 'other'" in capsys.readouterr().err
    calibration = calibration_of(source, tmp_path / "damaged")
    save_file({"lm_head.weight": np.zeros(64, np.float32)}, calibration / "importance.safetensors")
    assert quantize(source, tmp_path / "out", "--calibration", calibration) == 65
    assert "not as `calibrate` left it" in capsys.readouterr().err
    assert quantize(source, tmp_path / "out", "--calibration", tmp_path / "nowhere") == 66


PRUNED = {"keep": 2, "criterion": "reap", "super_experts": [[1, 3]], "kept_experts": {"1": [0, 3], "2": [1, 2]}}
DAMAGES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "no criterion": lambda pruned, held_out: pruned.pop("criterion"),
    "no keep": lambda pruned, held_out: pruned.pop("keep"),
    "another keep": lambda pruned, held_out: pruned.update(keep=3),
    "no kept experts": lambda pruned, held_out: pruned.pop("kept_experts"),
    "experts by name": lambda pruned, held_out: pruned["kept_experts"].update({"2": ["1", "2"]}),
    "a super-expert of no layer": lambda pruned, held_out: pruned.update(super_experts=[[3]]),
    "no values": lambda pruned, held_out: held_out.pop("values"),
    "values in words": lambda pruned, held_out: held_out.update(values="many"),
    "no overflows of K": lambda pruned, held_out: held_out.pop("k_over"),
    "no overflows of V": lambda pruned, held_out: held_out.update(v_over=None),
    "a headroom missing": lambda pruned, held_out: held_out["k_over"].pop("1.15"),
}


@pytest.mark.parametrize("damage", [None, *DAMAGES])
def test_damaged_parts_are_found_when_a_calibration_is_opened(
    damage: str | None, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = calibration_of(make_checkpoint(), tmp_path / "cal")
    document = json.loads((folder / "calibration.json").read_text())
    document["pruned"] = copy.deepcopy(PRUNED)
    if damage is None:
        (folder / "calibration.json").write_text(json.dumps(document))
        assert open_calibration(folder).kept_experts == {1: (0, 3), 2: (1, 2)}
        return
    DAMAGES[damage](document["pruned"], document["kv"]["layers"]["1"]["held_out"])
    (folder / "calibration.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"calibration\.json: damaged \(.*Calibrate again"):
        open_calibration(folder)
