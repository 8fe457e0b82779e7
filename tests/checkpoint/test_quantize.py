from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from step128_checkpoint import quantize as quantize_module
from step128_checkpoint.cli import main
from step128_checkpoint.dtypes import from_float32, to_float32
from step128_checkpoint.policy import load_policy
from step128_checkpoint.reader import open_checkpoint
from step128_kernels import codebook

MakeCheckpoint = Callable[..., Path]
EXPERTS = "model.layers.1.moe.gate_proj.weight"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def weight(folder: Path, name: str) -> np.ndarray:
    """A tensor of ours, read in full, as float32."""
    with open_checkpoint(folder) as checkpoint:
        tensor = checkpoint.tensors[name]
        return to_float32(checkpoint.read(name), tensor.dtype, tensor.shape)


def foreign_read(folder: Path, name: str) -> np.ndarray:
    """A tensor as the safetensors library reads it."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / weight_map[name], "np") as file:
        return file.get_tensor(name)


@pytest.mark.parametrize("scale_search", ["mse", "absmax"])
@pytest.mark.parametrize("policy_name", ["experts", "experts+linears", "all-linears", "all"])
def test_round_trip_is_the_codebooks(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy_name: str,
    scale_search: codebook.ScaleSearch,
) -> None:
    monkeypatch.setattr(quantize_module, "_PIECE_WEIGHTS", 1000)  # several pieces a matrix, the last one shorter
    source, packed, plain = make_checkpoint(), tmp_path / "nl4", tmp_path / "f32"
    assert run("quantize", source, packed, "--policy", policy_name, "--method", scale_search) == 0
    assert run("dequantize", packed, plain) == 0
    policy = load_policy(policy_name)
    quantized = 0
    before, after = open_checkpoint(source), open_checkpoint(plain)
    assert set(before.tensors) == set(after.tensors)
    for name in before.tensors:
        if policy.quantizes(name, before.num_hidden_layers):
            indices, scale = codebook.quantize(weight(source, name), None, scale_search)
            np.testing.assert_array_equal(foreign_read(packed, f"{name}_packed"), indices)
            np.testing.assert_array_equal(foreign_read(packed, f"{name}_scale"), scale)
            np.testing.assert_array_equal(foreign_read(plain, name), codebook.dequantize(indices, scale))
            quantized += 1
        else:
            np.testing.assert_array_equal(weight(plain, name), weight(source, name))
            assert after.tensors[name].dtype == before.tensors[name].dtype
    assert quantized > 0


def test_config_and_files_are_carried(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, packed, plain = make_checkpoint(), tmp_path / "nl4", tmp_path / "bf16-again"
    assert run("quantize", "--method", "mse", source, packed) == 0
    config = json.loads((packed / "config.json").read_text())
    entry = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert entry == {
        "quant_method": "nl4",
        "format_version": 1,
        "group_size": 16,
        "bits_per_weight": 5.0,
        "codebook": list(codebook.CODEBOOK),
        "scale_dtype": "float16",
        "policy": "all-linears",
        "quantized_components": [
            "routed_experts",
            "shared_experts",
            "attention",
            "dense_mlp",
            "lm_head",
            "mtp_linears",
            "mtp_heads",
        ],
        "unquantized_components": ["embed_tokens", "vision_linears"],
        "method": "mse",
        "calibration": None,
    }
    for name in ("tokenizer.json", "chat_template.jinja", "model-kvscales.safetensors"):
        assert (packed / name).exists()
    assert (packed / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (packed / "tiny_report.json").exists()
    assert not (packed / ".cache").exists()
    assert run("dequantize", packed, plain, "--dtype", "bfloat16") == 0
    assert json.loads((plain / "config.json").read_text()) == config
    name = "model.layers.1.self_attn.v_proj.v_scale"
    np.testing.assert_array_equal(foreign_read(plain, name), foreign_read(source, name))
    expanded = codebook.dequantize(foreign_read(packed, f"{EXPERTS}_packed"), foreign_read(packed, f"{EXPERTS}_scale"))
    rounded = to_float32(from_float32(expanded, "BF16").tobytes(), "BF16", expanded.shape)
    np.testing.assert_array_equal(weight(plain, EXPERTS), rounded)


def test_float32_result_says_so(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    assert run("quantize", "--method", "mse", make_checkpoint(), tmp_path / "nl4") == 0
    assert run("dequantize", tmp_path / "nl4", tmp_path / "f32") == 0
    config = json.loads((tmp_path / "f32" / "config.json").read_text())
    assert (config["torch_dtype"], config["text_config"]["torch_dtype"]) == ("float32", "float32")
    assert "quantization_config" not in config


def test_importance_by_tensor_and_by_expert(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, importance = make_checkpoint(), tmp_path / "importance.safetensors"
    random = np.random.default_rng(1)
    by_expert = random.random((4, 64), dtype=np.float32)
    by_channel = random.random(64, dtype=np.float32)
    save_file({EXPERTS: by_expert, "lm_head.weight": by_channel}, importance)
    assert run("quantize", source, tmp_path / "nl4", "--importance", importance) == 0
    for expert in range(4):
        _, scale = codebook.quantize(weight(source, EXPERTS)[expert], by_expert[expert])
        np.testing.assert_array_equal(foreign_read(tmp_path / "nl4", f"{EXPERTS}_scale")[expert], scale)
    _, scale = codebook.quantize(weight(source, "lm_head.weight"), by_channel)
    np.testing.assert_array_equal(foreign_read(tmp_path / "nl4", "lm_head.weight_scale"), scale)
    entry = json.loads((tmp_path / "nl4" / "config.json").read_text())["quantization_config"]
    assert len(entry["calibration"]) == 64


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("lm_head.weight", (32,), r"\[64\] is needed"), ("lm_tail.weight", (64,), "is no weight of")],
)
def test_bad_importance(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    shape: tuple[int, ...],
    message: str,
) -> None:
    importance = tmp_path / "importance.safetensors"
    save_file({name: np.ones(shape, np.float32)}, importance)
    assert run("quantize", make_checkpoint(), tmp_path / "nl4", "--importance", importance) == 65
    error = capsys.readouterr().err
    assert name in error
    assert message.replace("\\", "") in error


def test_bad_weights_name_the_tensor_and_leave_nothing(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.ones((4, 32, 64), np.float32)
    values[2, 7, 5] = np.nan
    source = make_checkpoint(replace={EXPERTS: values})
    assert run("quantize", "--method", "mse", source, tmp_path / "nl4") == 65
    error = capsys.readouterr().err
    assert f"tensor {EXPERTS}, matrix 2, rows 0 to 31" in error
    assert "NaN" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16"]


def test_columns_not_a_multiple_of_16(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint(share_expert_dim=24)
    assert run("quantize", "--method", "mse", source, tmp_path / "nl4") == 65
    assert "share_expert.down_proj.weight has shape [64, 24]: its last dimension, 24" in capsys.readouterr().err
    assert run("quantize", "--method", "mse", source, tmp_path / "nl4", "--policy", "experts") == 0


def test_quantized_input_and_foreign_names_are_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint()
    assert run("quantize", "--method", "mse", source, tmp_path / "nl4") == 0
    assert run("quantize", "--method", "mse", tmp_path / "nl4", tmp_path / "twice") == 65
    assert "quantized already (quant_method 'nl4')" in capsys.readouterr().err
    assert run("dequantize", source, tmp_path / "twice") == 65
    assert "is not quantized" in capsys.readouterr().err
    names = {"model.embed_tokens.weight": (32, 64), "decoder.0.experts.weight": (4, 32, 64)}
    assert run("quantize", "--method", "mse", make_checkpoint("foreign", names), tmp_path / "twice") == 65
    assert "the tensors' names show" in capsys.readouterr().err


def test_dry_run_writes_nothing_and_gives_sizes(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint()
    assert run("quantize", "--method", "mse", source, tmp_path / "nl4", "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]
    assert run("quantize", "--method", "mse", source, tmp_path / "nl4", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert planned["components"] == done["components"]
    experts = next(row for row in done["components"] if row["component"] == "routed_experts")
    assert experts["bits_per_weight"] == 5.0


# Peak resident memory of a process that quantizes and carries tensors far larger than its bound.
MEASURED_RUN = """
import re, sys
from pathlib import Path
import numpy as np
from step128_checkpoint.cli import main
from step128_checkpoint.quantization import engine
def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
engine.quantize(np.ones((1, 16), np.float32), None, "absmax", "cpu")  # loads the compiler: 90 MB, whatever comes
base = peak_kib()
code = main(["quantize", sys.argv[1], sys.argv[2], "--policy", "experts", "--method", "absmax", "--jobs", "2"])
assert code == 0
print((peak_kib() - base) * 1024)
"""


def test_memory_is_bounded_by_pieces(tmp_path: Path, step_model: Callable[..., Any]) -> None:
    """400 MB: two carried tensors of 180 MB each and three 3-D weights of 14 MB."""
    source = tmp_path / "big"
    source.mkdir()
    config, shapes = step_model(
        num_hidden_layers=1,
        num_nextn_predict_layers=0,
        moe_layers_enum="0",
        vocab_size=22000,
        hidden_size=4096,
        moe_num_experts=8,
        moe_intermediate_size=208,
    )
    (source / "config.json").write_text(json.dumps(config))
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text_bytes = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as stream:
        stream.write(len(text_bytes).to_bytes(8, "little") + text_bytes)
        stream.truncate(8 + len(text_bytes) + end)  # sparse zeros
    command = [sys.executable, "-c", MEASURED_RUN, str(source), str(tmp_path / "nl4")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    used_bytes = int(done.stdout.splitlines()[-1])
    print(f"peak over the start: {used_bytes / 1e6:.0f} MB for {end / 1e6:.0f} MB of weights")
    assert used_bytes < 100e6  # two jobs: twice the bound that quantize.py states


def test_a_file_of_importance_decides_the_bytes_and_is_named(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupted run must not go on with other weights, and the product must name those that it used."""
    source, hashes = make_checkpoint(), []
    for number in (1, 2):
        path = tmp_path / f"{number}.safetensors"
        save_file({EXPERTS: np.random.default_rng(number).random((4, 64), dtype=np.float32)}, path)
        assert run("quantize", source, tmp_path / f"nl4-{number}", "--importance", path) == 0
        config = json.loads((tmp_path / f"nl4-{number}" / "config.json").read_text())
        hashes.append(config["quantization_config"]["calibration"])
    assert hashes[0] != hashes[1]
    assert (
        run("quantize", source, tmp_path / "gptq", "--method", "gptq", "--importance", tmp_path / "1.safetensors") == 78
    )
    assert "--importance cannot be used with --method gptq" in capsys.readouterr().err
