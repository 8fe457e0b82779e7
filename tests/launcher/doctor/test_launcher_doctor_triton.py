"""The doctor's word on a Triton that is not the one the kernels were tuned with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from step128_launcher.configs_dir import find_configs_dir
from step128_launcher.doctor import kernel_compiler
from step128_launcher.doctor.context import Context
from step128_launcher.hardware import probe


def context(configs_dir: Path, root: Path = Path("/")) -> Context:
    return Context(probe(), {}, None, root, configs_dir)


def configs(folder: Path, *versions: Any) -> Path:
    (folder / "tuned").mkdir()
    for number, version in enumerate(versions):
        (folder / f"tuned/{number}.json").write_text(json.dumps({"versions": {"triton": version}}))
    return folder


@pytest.mark.parametrize(
    ("version", "outcome"),
    [("3.9.0", "PASS"), ("3.9.1+rocm7.2", "PASS"), ("3.8.0", "WARN"), ("3.10.0", "WARN"), ("4.9.0", "WARN")],
)
def test_another_release_is_worth_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, outcome: str
) -> None:
    monkeypatch.setattr(kernel_compiler, "installed", lambda names: SimpleNamespace(version=version))
    found = kernel_compiler.check_triton(context(configs(tmp_path, "3.9.0")))
    assert found.outcome == outcome and version in found.evidence and "3.9.0" in found.evidence
    assert ("step128-kernels inspect" in found.remedy) == (outcome == "WARN")


def test_nothing_is_said_where_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = configs(tmp_path, 3, None)
    (folder / "tuned/broken.json").write_text("{")
    monkeypatch.setattr(kernel_compiler, "installed", lambda names: SimpleNamespace(version="3.9.0"))
    assert kernel_compiler.check_triton(context(folder)).outcome == "SKIP"
    assert kernel_compiler.check_triton(context(folder, tmp_path)).outcome == "SKIP"
    monkeypatch.setattr(kernel_compiler, "installed", lambda names: None)
    assert kernel_compiler.check_triton(context(find_configs_dir())).outcome == "SKIP"


def test_the_shipped_configs_name_the_triton_of_this_project() -> None:
    assert kernel_compiler.tuned_with(context(find_configs_dir())) == {"3.9.0"}
