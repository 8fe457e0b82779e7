from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from step128_checkpoint.calibration.match import check_match, pruning_of
from step128_checkpoint.calibration.result import open_calibration
from step128_checkpoint.cli import main
from step128_checkpoint.dtypes import raw_array
from step128_checkpoint.errors import CheckpointError, ConfigurationError
from step128_checkpoint.manifest import headers_sha256
from step128_checkpoint.pruning import prune as prune_module
from step128_checkpoint.pruning.decide import Pruning
from step128_checkpoint.pruning.prune import plan_pruning, slice_step
from step128_checkpoint.reader import Checkpoint, open_checkpoint

EXPERTS, TOP_K = 8, 2
KEPT = {1: (0, 3, 4, 6, 7), 2: (1, 2, 3, 5, 6)}
BY_EXPERT = re.compile(r"\.moe\.((gate|up|down)_proj\.weight|gate\.weight|router_bias)$")

# A run that kills itself, without warning, after a number of written bytes.
KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from step128_checkpoint.conversion import convert
from step128_checkpoint.pruning.decide import Pruning
from step128_checkpoint.pruning.prune import plan_pruning
from step128_checkpoint.reader import open_checkpoint
left = int(sys.argv[3])
def count(done):
    global left
    left -= done
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
plan = plan_pruning(open_checkpoint(Path(sys.argv[1])), Pruning({1: (0, 3, 4, 6, 7), 2: (1, 2, 3, 5, 6)}), 60_000)
convert(plan, Path(sys.argv[2]), 2, False, count)
"""


@pytest.fixture
def source(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(moe_num_experts=EXPERTS, moe_top_k=TOP_K)


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, its bytes as unsigned integers of the element's size."""
    with open_checkpoint(folder) as checkpoint:
        return {
            name: raw_array(checkpoint.read(name), tensor.dtype, tensor.shape)
            for name, tensor in checkpoint.tensors.items()
        }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def calibrate(folder: Path, checkpoint: Checkpoint, pruned: dict[str, Any] | None = None) -> Path:
    """A calibration folder as `calibrate` leaves it, its saliency made up: expert e of layer l scores (e * 3 + l) % 8.

    Expert 5 of layer 2 (score 1) is a super-expert by its activation.
    """
    folder.mkdir()
    tensors = {}
    for layer in (1, 2):
        score = (np.arange(EXPERTS) * 3 + layer) % EXPERTS
        tokens = np.asarray([10, 20, 30, 40, 50, 60, 70, 80])
        largest = np.where((layer == 2) & (np.arange(EXPERTS) == 5), 500.0, 1.0 + np.arange(EXPERTS))
        tensors |= {
            f"layers.{layer}.tokens": tokens,
            f"layers.{layer}.gated_norm_sum": (score * tokens).astype(np.float64),
            f"layers.{layer}.norm_sum": np.arange(EXPERTS, 0.0, -1.0),
            f"layers.{layer}.max_activation": largest.astype(np.float32),
        }
    save_file(tensors, folder / "saliency.safetensors")
    save_file({"lm_head.weight": np.ones(64, np.float32)}, folder / "importance.safetensors")
    names = ("saliency.safetensors", "importance.safetensors")
    held_out = {"values": 0, "k_over": {}, "v_over": {}}
    ranges = {"k_absmax": 2.0, "v_absmax": 2.0, "held_out": held_out}
    document = {
        "format": "step128-calibration",
        "format_version": 1,
        "samples": {"sha256": "5a", "mixture": [{"name": "code", "weight": 1.0}]},
        "checkpoint": {"name": "tiny", "headers_sha256": headers_sha256(checkpoint)},
        "pruned": pruned,
        "kv": {"layers": {str(layer): ranges for layer in range(checkpoint.num_hidden_layers)}},
        "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names},
    }
    (folder / "calibration.json").write_text(json.dumps(document))
    return folder


def prune(source: Path, out: Path, *options: str | Path) -> int:
    return main(["prune", str(source), str(out), "--max-shard-bytes", "60000", *map(str, options)])


def test_slices_equal_indexing_and_the_rest_keeps_its_bytes(source: Path, tmp_path: Path) -> None:
    calibration = calibrate(tmp_path / "cal", open_checkpoint(source))
    assert prune(source, tmp_path / "out", "--calibration", calibration, "--keep", "5") == 0
    before, after = arrays(source), arrays(tmp_path / "out")
    assert set(after) == set(before)
    sliced = [name for name in before if BY_EXPERT.search(name)]
    assert len(sliced) == 2 * 5
    # By hand: layer 1 scores 1 4 7 2 5 0 3 6, layer 2 scores 2 5 0 3 6 1 4 7, where expert 5 is a super-expert.
    kept = {1: [1, 2, 4, 6, 7], 2: [1, 4, 5, 6, 7]}
    for name, values in before.items():
        wanted = values[kept[int(name.split(".")[2])]] if name in sliced else values
        np.testing.assert_array_equal(after[name], wanted, err_msg=name)
        assert after[name].dtype == wanted.dtype
    with open_checkpoint(source) as one, open_checkpoint(tmp_path / "out") as other:
        assert all(one.tensors[name].dtype == other.tensors[name].dtype for name in before)
        assert {t.path.name for t in other.tensors.values() if t.name.endswith("_scale")} == {
            "model-kvscales.safetensors"
        }


def test_config_index_and_files(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune(source, tmp_path / "out", "--criterion", "random", "--keep", "5") == 0
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    before["text_config"]["moe_num_experts"] = 5
    assert after == before
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    checkpoint = open_checkpoint(tmp_path / "out")
    assert index["weight_map"] == {name: tensor.path.name for name, tensor in checkpoint.tensors.items()}
    assert index["metadata"]["total_size"] == sum(tensor.size_bytes for tensor in checkpoint.tensors.values())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_record_names_old_experts_and_survives_a_second_pruning(source: Path, tmp_path: Path) -> None:
    calibration = calibrate(tmp_path / "cal", open_checkpoint(source))
    assert prune(source, tmp_path / "once", "--calibration", calibration, "--keep", "6", "--protect", "1:5") == 0
    record = pruning_of(open_checkpoint(tmp_path / "once"))
    assert record is not None
    assert record["kept_experts"] == {"1": [1, 2, 4, 5, 6, 7], "2": [1, 3, 4, 5, 6, 7]}
    assert (record["keep"], record["of"], record["criterion"]) == (6, 8, "reap")
    assert (record["super_experts"], record["protected"]) == ([[2, 5]], [[1, 5]])
    assert record["calibration"] == {
        "sha256": open_calibration(calibration).sha256,
        "samples": {"sha256": "5a", "mixture": [{"name": "code", "weight": 1.0}]},
    }
    assert record["headers_sha256"] == headers_sha256(open_checkpoint(source))
    assert prune(tmp_path / "once", tmp_path / "twice", "--criterion", "random", "--keep", "3") == 0
    second = pruning_of(open_checkpoint(tmp_path / "twice"))
    assert second is not None
    assert second["previous"] == record
    assert pruning_of(open_checkpoint(source)) is None


def test_report_and_picture(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibration = calibrate(tmp_path / "cal", open_checkpoint(source))
    assert prune(source, tmp_path / "out", "--calibration", calibration, "--keep", "5", "--json") == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = tmp_path / "out"
    assert printed["report"] == str(folder / "step128_pruning_report.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16", "cal", "out"]
    report = json.loads((folder / "step128_pruning_report.json").read_text())
    layer = report["layers"]["2"]
    assert layer["kept"] == [1, 4, 5, 6, 7]
    assert layer["dropped"] == [0, 2, 3]
    assert layer["old_to_new"] == {"1": 0, "4": 1, "5": 2, "6": 3, "7": 4}
    assert layer["saliency"] == [2, 5, 0, 3, 6, 1, 4, 7]
    assert layer["super_experts"] == [5]
    assert layer["dropped_token_share"] == pytest.approx((10 + 30 + 40) / 360)
    mass = [2 * 10, 5 * 20, 0 * 30, 3 * 40, 6 * 50, 1 * 60, 4 * 70, 7 * 80]
    assert layer["dropped_saliency_share"] == pytest.approx((mass[0] + mass[2] + mass[3]) / sum(mass))
    assert report["super_experts"] == [[2, 5]]
    assert report["mean_of_layers"]["dropped_token_share"] == pytest.approx((80 / 360 + 110 / 360) / 2)
    assert printed["mean_of_layers"] == report["mean_of_layers"]
    with Image.open(folder / "step128_pruning_report.png") as picture:
        assert picture.size[0] == 1800
        pixels = np.asarray(picture.convert("RGB"), dtype=int)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    assert ((blue > red + 60) & (blue > green)).mean() > 0.1  # kept
    assert ((red > blue + 60) & (red > green)).mean() > 0.05  # dropped
    assert ((red > 240) & (abs(green - 212) < 6) & (blue < 20)).sum() > 50  # the super-expert's mark


def test_score_of_another_criterion_is_reported(source: Path, tmp_path: Path) -> None:
    calibration = calibrate(tmp_path / "cal", open_checkpoint(source))
    options = ("--calibration", calibration, "--keep", "5", "--criterion", "frequency", "--super-expert-layers", "0")
    assert prune(source, tmp_path / "out", *options) == 0
    layer = json.loads((tmp_path / "out" / "step128_pruning_report.json").read_text())["layers"]["1"]
    assert layer["score"] == layer["tokens"]
    assert layer["kept"] == [3, 4, 5, 6, 7]


def test_random_needs_no_calibration_and_follows_its_seed(source: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        assert prune(source, tmp_path / name, "--criterion", "random", "--keep", "4", "--seed", seed) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    records = [pruning_of(open_checkpoint(tmp_path / name)) for name in "ac"]
    assert all(records)
    assert records[0]["kept_experts"] != records[1]["kept_experts"]
    assert records[0]["kept_experts"]["1"] != records[0]["kept_experts"]["2"]
    assert not list((tmp_path / "a").glob("*.png")), "nothing was measured that could be drawn"


def test_choice_of_a_calibration_that_pruned_is_used(
    source: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned = {
        "keep": 5,
        "criterion": "reap",
        "super_experts": [[2, 5]],
        "kept_experts": {str(layer): list(kept) for layer, kept in KEPT.items()},
        "warnings": ["layer 1 lost expert 2"],
    }
    calibration = calibrate(tmp_path / "cal", open_checkpoint(source), pruned)
    assert prune(source, tmp_path / "out", "--calibration", calibration, "--keep", "5", "--json") == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == pruned["warnings"]
    record = pruning_of(open_checkpoint(tmp_path / "out"))
    assert record is not None
    assert record["kept_experts"] == pruned["kept_experts"]
    check_match(open_checkpoint(tmp_path / "out"), open_calibration(calibration))
    with pytest.raises(CheckpointError, match="Prune first"):
        check_match(open_checkpoint(source), open_calibration(calibration))
    others = open_checkpoint(make_checkpoint("others", moe_num_experts=EXPERTS))
    other = calibrate(tmp_path / "other-cal", others, pruned)
    with pytest.raises(CheckpointError, match="was pruned from another checkpoint, whose config or tensors differ"):
        check_match(open_checkpoint(tmp_path / "out"), open_calibration(other))
    for option, value in (("keep", "6"), ("criterion", "ean"), ("protect", "1:1"), ("super-expert-layers", "0.75")):
        assert prune(source, tmp_path / "other", "--calibration", calibration, f"--{option}", value) == 78
        assert f"Leave --{option} out" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_killed_at_random_points_gives_identical_bytes(source: Path, tmp_path: Path) -> None:
    def run(out: Path, after_bytes: int) -> int:
        command = [sys.executable, "-c", KILLED_RUN, str(source), str(out), str(after_bytes)]
        return subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode

    assert run(tmp_path / "whole", 1 << 40) == 0
    total_bytes = sum(step.size_bytes for step in plan_pruning(open_checkpoint(source), Pruning(KEPT)).steps)
    points = [*random.Random(128).choices(range(1, total_bytes), k=4), total_bytes]
    for after_bytes in sorted(points):
        assert run(tmp_path / "resumed", after_bytes) == -signal.SIGKILL
        assert not (tmp_path / "resumed").exists()
    assert run(tmp_path / "resumed", 1 << 40) == 0
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert len([name for name in contents(tmp_path / "whole") if name.startswith("model-0")]) >= 3


@pytest.mark.parametrize("piece_bytes", [1000, 4096, 10_000, 1 << 23])
def test_pieces_are_bounded_and_concatenate(source: Path, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows (one expert's matrix) are 4096 bytes: parts of a row, one row, two rows and all rows to a piece.
    monkeypatch.setattr(prune_module, "PIECE_BYTES", piece_bytes)
    name = "model.layers.2.moe.down_proj.weight"
    with open_checkpoint(source) as checkpoint:
        step = slice_step(checkpoint, checkpoint.tensors[name], KEPT[2])
        pieces = [step.produce(number)[0] for number in range(step.pieces)]
    assert max(map(len, pieces)) <= piece_bytes
    assert b"".join(pieces) == arrays(source)[name][list(KEPT[2])].tobytes()
    assert len(pieces[0]) == min(piece_bytes // 4096 * 4096 or piece_bytes, 5 * 4096)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({1: (0, 1, 2)}, "not said which experts layer 2 keeps"),
        (KEPT | {0: (0, 1, 2, 3, 4)}, "layer 0 has no experts to prune"),
        ({1: (0, 1, 2), 2: (0, 1)}, "layer 2 would keep 2 experts and another 3"),
        ({1: (0,), 2: (1,)}, "1 experts are too few: each token is routed to 2"),
        ({1: (0, 1), 2: (7, 8)}, "layer 2: the experts to keep must be ascending numbers below 8"),
        ({1: (0, 1), 2: (3, 2)}, "layer 2: the experts to keep must be ascending"),
        ({1: (0, 1), 2: (2, 2)}, "layer 2: the experts to keep must be ascending"),
    ],
)
def test_choices_that_do_not_fit_are_refused(source: Path, kept: dict[int, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan_pruning(open_checkpoint(source), Pruning(kept))


def test_quantized_or_broken_input_is_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    broken = make_checkpoint("broken", drop=r"2\.moe\.router_bias", moe_num_experts=EXPERTS, moe_top_k=TOP_K)
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.2\.moe\.router_bias"):
        plan_pruning(open_checkpoint(broken), Pruning(KEPT))
    quantized = dataclasses.replace(open_checkpoint(broken), config={"quantization_config": {"quant_method": "step"}})
    with pytest.raises(CheckpointError, match="quantized already"):
        plan_pruning(quantized, Pruning(KEPT))
    silent = make_checkpoint("silent", moe_num_experts=EXPERTS)
    with pytest.raises(CheckpointError, match="moe_top_k is None"):
        plan_pruning(open_checkpoint(silent), Pruning(KEPT))


def test_nan_in_a_kept_expert_is_found(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    values = np.zeros((EXPERTS, 64, 32), dtype=np.float32)
    values[4, 5, 6] = np.nan
    bad = make_checkpoint(
        replace={"model.layers.1.moe.down_proj.weight": values}, moe_num_experts=EXPERTS, moe_top_k=TOP_K
    )
    with open_checkpoint(bad) as checkpoint:
        for kept, fails in (((0, 4), True), ((0, 5), False)):
            step = slice_step(checkpoint, checkpoint.tensors["model.layers.1.moe.down_proj.weight"], kept)
            if fails:
                with pytest.raises(CheckpointError, match=r"model\.layers\.1\.moe\.down_proj\.weight.*NaN"):
                    step.produce(0)
            else:
                assert len(step.produce(0)[0]) == 2 * 64 * 32 * 2


def test_calibration_of_another_checkpoint_is_refused(
    source: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_checkpoint("other", moe_num_experts=EXPERTS, moe_top_k=TOP_K, rope_theta=1.0)
    calibration = calibrate(tmp_path / "cal", open_checkpoint(other))
    assert prune(source, tmp_path / "out", "--calibration", calibration, "--keep", "5") == 65
    assert "calibration of another checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--keep", "5"], 78, "Run `calibrate`"),
        (["--criterion", "random"], 78, "--keep N"),
        (["--criterion", "random", "--keep", "9"], 78, "9 experts cannot be kept of 8"),
        (["--criterion", "random", "--keep", "1"], 78, "each token needs 2"),
        (["--criterion", "random", "--keep", "5", "--protect", "0:1"], 78, "layer 0 has no experts to protect"),
        (["--criterion", "random", "--keep", "5", "--protect", "1:8"], 78, "layer 1 has no expert 8"),
        (["--calibration", "nowhere", "--keep", "5"], 66, "run `calibrate`"),
    ],
)
def test_wrong_use_says_what_to_do_and_writes_nothing(
    source: Path, tmp_path: Path, options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(source, tmp_path / "out", *options) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_dry_run_writes_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibration = calibrate(tmp_path / "cal", open_checkpoint(source))
    assert prune(source, tmp_path / "out", "--calibration", calibration, "--keep", "5", "--dry-run") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "8 -> 5 experts in each of 2 layers" in printed
    assert "Super-experts kept (layer:expert): 2:5" in printed
    assert not list(tmp_path.glob("out*"))


def test_report_belongs_to_its_product_alone(source: Path, tmp_path: Path) -> None:
    calibration = calibrate(tmp_path / "cal", open_checkpoint(source))
    assert prune(source, tmp_path / "once", "--calibration", calibration, "--keep", "6") == 0
    reports = {"step128_pruning_report.json", "step128_pruning_report.png"}
    assert reports <= contents(tmp_path / "once").keys()
    assert reports <= json.loads((tmp_path / "once" / "step128_manifest.json").read_text())["files"].keys()
    assert main(["quantize", "--method", "absmax", str(tmp_path / "once"), str(tmp_path / "nl4")]) == 0
    assert not reports & contents(tmp_path / "nl4").keys()
    assert "step128_pruning.json" in contents(tmp_path / "nl4")


def test_failed_pruning_leaves_nothing(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    values = np.full((EXPERTS, 64, 32), np.nan, dtype=np.float32)
    bad = make_checkpoint(
        replace={"model.layers.1.moe.down_proj.weight": values}, moe_num_experts=EXPERTS, moe_top_k=TOP_K
    )
    options = ("--criterion", "random", "--keep", "5")
    assert prune(bad, tmp_path / "out", *options) == 65
    assert prune(bad, tmp_path / "out", *options, "--max-memory", "1MiB") == 78
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]


def test_kv_scales_of_the_unpruned_model_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration = calibrate(tmp_path / "cal", open_checkpoint(source))
    options = ("--calibration", calibration, "--keep", "5", "--kv-scales", "calibrated")
    assert prune(source, tmp_path / "out", *options) == 78
    assert "made with `calibrate --prune 5`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
