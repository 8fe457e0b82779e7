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
    assert run("quantize", make_checkpoint(), tmp_path / "nl4") == 0
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
    assert run("quantize", make_checkpoint(), tmp_path / "nl4") == 0
    for path in tmp_path.glob("nl4/*"):
        if path.suffix in (".safetensors", ".json"):  # same length, so that the headers stay valid
            path.write_bytes(path.read_bytes().replace(b"lm_head.weight_scale", b"lm_head.weight_scald"))
    assert run("inspect", tmp_path / "nl4") == 65
    assert "lm_head.weight_packed has no scale" in capsys.readouterr().out.replace("\n", " ")
