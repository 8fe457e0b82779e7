from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from step128_checkpoint.cli import main
from step128_checkpoint.model_card import write_model_card
from step128_checkpoint.reader import open_checkpoint
from step128_checkpoint.verify import count_not_finite

MakeCheckpoint = Callable[..., Path]


def verify(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["verify", str(folder), "--json", *options])
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return code, found


@pytest.fixture
def product(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    out = tmp_path / "nl4"
    assert main(["quantize", str(make_checkpoint()), str(out), "--method", "absmax"]) == 0
    return out


def change_byte(folder: Path, name: str, offset: int, value: int | None = None) -> Path:
    """Change one byte of a tensor in its file; XOR 1 if no value is given."""
    tensor = open_checkpoint(folder).tensors[name]
    with tensor.path.open("r+b") as stream:
        stream.seek(tensor.offset_bytes + offset)
        byte = stream.read(1)[0] ^ 1 if value is None else value
        stream.seek(tensor.offset_bytes + offset)
        stream.write(bytes([byte]))
    return tensor.path


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_whole_product(product: Path, capsys: pytest.CaptureFixture[str], jobs: str) -> None:
    code, found = verify(product, capsys, "--jobs", jobs)
    assert code == 0 and found["problems"] == []
    tensors = open_checkpoint(product).tensors.values()
    assert found["tensors"] == found["hashes"] == len(tensors)
    assert found["size_bytes"] == sum(tensor.size_bytes for tensor in tensors)
    assert found["float_tensors"] == sum(tensor.dtype != "U8" for tensor in tensors)
    assert found["has_manifest"] and found["file_hashes"] >= 4
    assert main(["verify", str(product)]) == 0
    assert "nothing is wrong" in capsys.readouterr().out


def test_foreign_checkpoint_has_no_manifest(
    make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_checkpoint()
    assert main(["verify", str(folder)]) == 0
    assert "no manifest: hashes not checked" in capsys.readouterr().out
    code, found = verify(folder, capsys)
    assert code == 0 and not found["has_manifest"] and found["hashes"] == 0


def test_one_changed_bit_is_named(product: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.moe.up_proj.weight_packed"
    path = change_byte(product, name, 17)
    code, found = verify(product, capsys)
    assert code == 65
    assert found["problems"] == [
        f"{path}: tensor {name} has other bytes than when it was written (SHA-256 differs from step128_manifest.json)"
    ]


def test_every_changed_tensor_and_file_is_named(product: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ["lm_head.weight_packed", "model.norm.weight", "model.layers.0.self_attn.k_proj.k_scale"]
    for name in changed:
        change_byte(product, name, 0)
    (product / "tokenizer.json").write_text("{}")
    (product / "chat_template.jinja").unlink()
    code, found = verify(product, capsys)
    assert code == 65 and len(found["problems"]) == 5
    text = "\n".join(found["problems"])
    assert all(f"tensor {name} has other bytes" in text for name in changed)
    assert "tokenizer.json: other bytes" in text and "chat_template.jinja: missing" in text


@pytest.mark.parametrize(("scale", "fits"), [(0.6, True), (1.0, False)])
def test_kept_k_scale_must_fit_the_norm(
    make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], scale: float, fits: bool
) -> None:
    """With w = 0.25 and heads of 16, K is at most 5: the limit is 64 * 5 / 448 = 0.714."""
    weight = {"model.layers.1.self_attn.k_norm.weight": np.full(16, 0.25, dtype=np.float32)}
    folder = make_checkpoint(replace=weight)
    name = "model.layers.1.self_attn.k_proj.k_scale"
    for offset, byte in enumerate(np.asarray([scale], dtype="<f4").tobytes()):
        change_byte(folder, name, offset, byte)
    code, found = verify(folder, capsys)
    assert code == (0 if fits else 65)
    assert main(["inspect", str(folder)]) == code
    if not fits:
        (problem,) = found["problems"]
        assert f"tensor {name} stores K up to 448" in problem and "no more than 5" in problem


@pytest.mark.parametrize(
    ("name", "bytes_at"),
    [
        ("model.norm.weight", {10: 0x80, 11: 0x7F}),  # bf16 infinity
        ("model.norm.weight", {10: 0xC1, 11: 0xFF}),  # bf16 NaN
        ("lm_head.weight_scale", {6: 0x00, 7: 0x7C}),  # f16 infinity
        ("model.layers.0.self_attn.v_proj.v_scale", {0: 0, 1: 0, 2: 0xC0, 3: 0x7F}),  # f32 NaN
    ],
)
def test_values_that_are_no_numbers(
    product: Path, capsys: pytest.CaptureFixture[str], name: str, bytes_at: dict[int, int]
) -> None:
    (product / "step128_manifest.json").unlink()
    for offset, value in bytes_at.items():
        change_byte(product, name, offset, value)
    code, found = verify(product, capsys)
    assert code == 65
    elements = open_checkpoint(product).tensors[name].elements
    assert any(f"tensor {name} holds 1 of {elements} values that are NaN" in line for line in found["problems"])


def test_nan_is_counted_as_numpy_counts() -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 16, 300_001).astype("<u2")
    assert count_not_finite(bits.tobytes(), "F16") == int((~np.isfinite(bits.view("<f2"))).sum())
    wide = (bits.astype(np.uint32) << 16).view("<f4")
    assert count_not_finite(bits.tobytes(), "BF16") == int((~np.isfinite(wide)).sum()) > 0
    assert count_not_finite(wide.tobytes(), "F32") == int((~np.isfinite(wide)).sum())
    assert count_not_finite(bits.tobytes(), "U8") == 0
    assert count_not_finite(b"", "BF16") == 0


def test_tensors_that_the_manifest_does_not_know_or_misses(product: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = product / "step128_manifest.json"
    manifest = json.loads(path.read_text())
    row = manifest["tensors"].pop("lm_head.weight_packed")
    manifest["tensors"]["made.up.weight"] = row
    manifest["tensors"]["model.norm.weight"]["file"] = "model-00009-of-00009.safetensors"
    manifest["files"]["../escape.txt"] = hashlib.sha256(b"").hexdigest()
    path.write_text(json.dumps(manifest))
    code, found = verify(product, capsys)
    text = "\n".join(found["problems"])
    assert code == 65 and len(found["problems"]) == 4
    assert "tensor made.up.weight is missing" in text
    assert "tensor lm_head.weight_packed is unknown to" in text
    assert "tensor model.norm.weight belongs into model-00009" in text
    assert "../escape.txt, which is outside the folder" in text


def test_malformed_manifest_is_a_problem(product: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = product / "step128_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tensors": [1]}))
    code, found = verify(product, capsys)
    assert code == 65 and "malformed" in found["problems"][0]


def test_wrong_shape_is_found(make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["moe_num_experts"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    code, found = verify(folder, capsys)
    assert code == 65 and any("config.json makes it [5," in line for line in found["problems"])


def test_file_cut_while_it_is_read(product: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from step128_checkpoint.verify import verify_checkpoint

    checkpoint = open_checkpoint(product)
    path = checkpoint.tensors["lm_head.weight_packed"].path
    path.write_bytes(path.read_bytes()[:-20])
    problems = verify_checkpoint(checkpoint, jobs=2).problems
    assert any("ends inside tensor" in line for line in problems)
    assert main(["verify", str(product), "--json"]) == 65
    assert "truncated" in json.loads(capsys.readouterr().out)["error"]


def test_card_written_afterwards_is_no_mismatch(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint()
    (source / "README.md").write_text("the maker's card")
    assert main(["quantize", str(source), str(tmp_path / "nl4"), "--method", "absmax"]) == 0
    write_model_card(tmp_path / "nl4", [], force=True)
    code, found = verify(tmp_path / "nl4", capsys)
    assert (code, found["problems"]) == (0, [])


def test_missing_folder(tmp_path: Path) -> None:
    assert main(["verify", str(tmp_path / "nowhere")]) == 66
