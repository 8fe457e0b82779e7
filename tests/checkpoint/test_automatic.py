"""`quantize` with nothing but IN and OUT, as a user of the published checkpoint runs it; GPTQ from a calibration."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from step128_checkpoint.calibration.result import Calibration, hessian_key
from step128_checkpoint.cli import main
from step128_checkpoint.header import TensorInfo
from step128_checkpoint.quantization.hessians import Hessians
from step128_kernels import codebook

Cli = Callable[..., subprocess.CompletedProcess[str]]
FEW = ("--samples", "8", "--tokens", "128")
EXPERTS = "model.layers.4.moe.down_proj.weight"


def calibration_with(folder: Path, **hessians: np.ndarray) -> Calibration:
    """A calibration folder with nothing but Hessians, all in one file."""
    (folder / "hessians").mkdir()
    path = folder / "hessians" / "layer-00003.safetensors"
    save_file(hessians, path)
    return Calibration(folder, {"files": {f"hessians/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()}})


def tensor(folder: Path, name: str) -> np.ndarray:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / weight_map[name], "np") as file:
        return file.get_tensor(name)


@pytest.fixture(scope="module")
def quantized_alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory, cli: Cli) -> Path:
    out = tmp_path_factory.mktemp("automatic") / "nl4"
    result = cli("step128-checkpoint", "quantize", tiny, out, *FEW)
    assert result.returncode == 0, result.stderr
    assert "No --calibration is given: making one" in result.stderr
    assert "largest errors" in result.stdout
    return out


def test_one_command_calibrates_and_quantizes(quantized_alone: Path, tiny: Path) -> None:
    entry = json.loads((quantized_alone / "config.json").read_text())["quantization_config"]
    assert entry["method"] == "importance"
    assert len(entry["calibration"]) == 64
    sweep = quantized_alone.with_name("nl4.calibration") / "sweep"
    with safe_open(sweep / "importance.safetensors", "np") as file:
        moments = file.get_tensor(EXPERTS)
    assert moments.shape == (16, 64)
    from step128_checkpoint.dtypes import to_float32
    from step128_checkpoint.reader import open_checkpoint

    with open_checkpoint(tiny) as checkpoint:
        weight = to_float32(checkpoint.read(EXPERTS), "BF16", checkpoint.tensors[EXPERTS].shape)
    for expert in (0, 7, 15):
        packed, scale = codebook.quantize(weight[expert], moments[expert])
        np.testing.assert_array_equal(tensor(quantized_alone, f"{EXPERTS}_packed")[expert], packed)
        np.testing.assert_array_equal(tensor(quantized_alone, f"{EXPERTS}_scale")[expert], scale)
    report = json.loads((quantized_alone / "quantization_report.json").read_text())
    assert all(row["output_sqnr_db"] > 10 for row in report["tensors"])
    # The tiny checkpoint brings KV scales of its own, as the published one does: they stay.
    name = "model.layers.0.self_attn.k_proj.k_scale"
    np.testing.assert_array_equal(tensor(quantized_alone, name), tensor(tiny, name))


def test_a_second_run_takes_the_calibration_that_is_there(
    quantized_alone: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = quantized_alone.with_name("again")
    quantized_alone.with_name("nl4.calibration").rename(quantized_alone.with_name("again.calibration"))
    try:
        assert main(["quantize", str(tiny), str(again), *FEW]) == 0
        assert "Using the calibration in" in capsys.readouterr().err
        assert (again / "step128_manifest.json").read_bytes() == (
            quantized_alone / "step128_manifest.json"
        ).read_bytes()
    finally:
        quantized_alone.with_name("again.calibration").rename(quantized_alone.with_name("nl4.calibration"))


def test_other_numbers_than_those_it_was_made_with_are_refused(
    quantized_alone: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = quantized_alone.with_name("other")
    quantized_alone.with_name("nl4.calibration").rename(quantized_alone.with_name("other.calibration"))
    try:
        assert main(["quantize", str(tiny), str(out), "--samples", "9", "--tokens", "128"]) == 78
        assert "a calibration of 8 samples of 128 tokens" in capsys.readouterr().err
    finally:
        quantized_alone.with_name("other.calibration").rename(quantized_alone.with_name("nl4.calibration"))
    assert main(["quantize", str(tiny), str(out), "--method", "mse", "--samples", "9"]) == 78
    assert "Leave them out" in capsys.readouterr().err


def test_a_dry_run_says_what_comes_first(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(tiny), str(tmp_path / "out"), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "a calibration of 3072 samples of 2048 tokens" in said
    assert "4.83 GB of disk for hidden states" in said  # 2 files x 3072 x 2048 x 192 channels x 2 bytes
    assert not list(tmp_path.iterdir())


def test_gptq_from_a_calibration_with_hessians(
    quantized_alone: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(tiny), str(tmp_path / "out"), "--method", "gptq"]) == 78
    assert "calibrate --hessians" in capsys.readouterr().err
    calibrations = quantized_alone.with_name("nl4.calibration")
    plain = ("--calibration", str(calibrations / "sweep"))
    assert main(["quantize", str(tiny), str(tmp_path / "out"), "--method", "gptq", *plain]) == 66
    assert "run `calibrate` again with --hessians" in capsys.readouterr().err
    samples = str(calibrations / "samples")
    assert main(["calibrate", str(tiny), str(tmp_path / "cal"), "--samples-from", samples, "--hessians"]) == 0
    out = tmp_path / "gptq"
    command = ["quantize", str(tiny), str(out), "--method", "gptq", "--calibration", str(tmp_path / "cal")]
    hidden = tmp_path / "cal" / "hessians" / "layer-00000.safetensors"
    hidden.rename(tmp_path / "aside")
    assert main(command) == 66
    assert "layer-00000.safetensors: no such file" in capsys.readouterr().err
    data = bytearray((tmp_path / "aside").read_bytes())
    data[-1] ^= 1
    hidden.write_bytes(data)
    assert main(command) == 65
    assert "not as `calibrate` left it" in capsys.readouterr().err
    (tmp_path / "aside").rename(hidden)
    assert main(command) == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["method"] == "gptq"
    # Errors move from the weights to where the inputs hardly vary: the plain error grows, or feedback did nothing.
    gptq, searched = (
        {
            row["name"]: row["sqnr_db"]
            for row in json.loads((folder / "quantization_report.json").read_text())["tensors"]
        }
        for folder in (out, quantized_alone)
    )
    dense = [name for name in gptq if ".self_attn." in name or ".mlp." in name]
    assert all(gptq[name] < searched[name] for name in dense)


def test_an_expert_shares_its_layers_hessian_and_has_its_own_moments(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    inputs = random.standard_normal((500, 32)) @ random.standard_normal((32, 32))
    shared = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    name = "model.layers.3.moe.gate_proj.weight"
    hessians = Hessians(calibration_with(tmp_path, **{hessian_key(name): shared}))
    weight = TensorInfo(name, "BF16", (4, 16, 32), tmp_path, 0)
    ratio = random.lognormal(0, 1, 32).astype(np.float32)
    factor = hessians.factor(weight, 2, np.diagonal(shared) * ratio)
    assert factor is not None
    damped = shared + np.eye(32) * 0.01 * np.diagonal(shared).mean()
    wanted = np.sqrt(ratio)[:, None] * damped * np.sqrt(ratio)[None, :]
    # float32 factors of a matrix whose condition is in the thousands
    np.testing.assert_allclose(factor.T @ factor @ wanted, np.eye(32), atol=2e-3)
    assert (np.tril(factor, -1) == 0).all()
    never = hessians.factor(weight, 1, np.zeros(32, np.float32))
    assert never is not None and np.isfinite(never).all()


def test_an_expert_that_saw_no_token_is_searched_without_feedback(tmp_path: Path) -> None:
    name = "model.layers.3.moe.down_proj.weight"
    own = np.stack([np.eye(16, dtype=np.float32), np.zeros((16, 16), np.float32)])
    hessians = Hessians(calibration_with(tmp_path, **{hessian_key(name): own}))
    weight = TensorInfo(name, "BF16", (2, 8, 16), tmp_path, 0)
    assert hessians.factor(weight, 0, np.ones(16, np.float32)) is not None
    assert hessians.factor(weight, 1, np.zeros(16, np.float32)) is None
