from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from step128_checkpoint.cli import main

MakeCheckpoint = Callable[..., Path]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_inspect(make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", "--method", "mse", make_checkpoint(), tmp_path / "nl4") == 0
    capsys.readouterr()
    assert run("inspect", tmp_path / "nl4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["policy"] == "all-linears"
    assert found["problems"] == []
    assert found["kv_scales"]["layers"] == 4
    assert found["kv_scales"]["k_min"] == pytest.approx(0.01)
    assert found["components"][-1]["component"] == "total"
    assert run("inspect", tmp_path / "nl4") == 0
    assert "routed_experts" in capsys.readouterr().out


def test_inspect_reports_problems(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quantize", "--method", "mse", make_checkpoint(), tmp_path / "nl4") == 0
    for path in tmp_path.glob("nl4/*"):
        if path.suffix in (".safetensors", ".json"):  # same length, so that the headers stay valid
            path.write_bytes(path.read_bytes().replace(b"lm_head.weight_scale", b"lm_head.weight_scald"))
    assert run("inspect", tmp_path / "nl4") == 65
    assert "lm_head.weight_packed has no scale" in capsys.readouterr().out.replace("\n", " ")


def test_inspect_details(make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", make_checkpoint(), tmp_path / "nl4", "--method", "absmax") == 0
    report = {"criterion": "reap", "keep": 4, "of": 6, "super_experts": [[1, 3]], "kept_experts": {"1": [0, 1, 2, 3]}}
    (tmp_path / "nl4" / "step128_pruning.json").write_text(json.dumps(report))
    capsys.readouterr()
    assert run("inspect", tmp_path / "nl4", "--json") == 0
    details = json.loads(capsys.readouterr().out)["details"]
    assert (details["layers"], details["moe_layers"], details["experts"], details["mtp_layers"]) == (3, 2, 4, 1)
    assert details["method"] == "absmax" and details["commands"] == ["quantize"]
    assert details["pruning"]["super_experts"] == [[1, 3]] and details["pruning"]["keep"] == 4
    assert details["file_bytes"] == sum(path.stat().st_size for path in (tmp_path / "nl4").glob("*.safetensors"))
    assert run("inspect", tmp_path / "nl4") == 0
    text = capsys.readouterr().out
    assert "3, 2 of them with 4 routed experts" in text and "MTP layers: 1 of 1" in text
    assert "4 of 6 experts kept by reap; super-experts: 1/3" in text and "manifest: quantize" in text
    assert "NL4 method: absmax" in text


def test_inspect_foreign_checkpoint(make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(drop=r"layers\.3\.|k_scale|v_scale")
    assert run("inspect", folder) == 0
    text = capsys.readouterr().out
    assert "MTP layers: 0 of 1" in text and "manifest: none" in text and "KV scales: none" in text


@pytest.mark.parametrize("name", ["step128_pruning.json", "step128_manifest.json"])
def test_inspect_names_a_malformed_report(
    make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = make_checkpoint()
    (folder / name).write_text('{"format": "step128-manifest", "format_version": 1}')
    assert run("inspect", folder) == 65
    assert f"{name}: malformed" in capsys.readouterr().out
