"""What a tuned file must hold: every mistake is named by file and key."""

import json
from pathlib import Path
from typing import Any

import pytest

from step128_kernels.tuned.schema import TuningFileError, read_file

R9700, STRIX = "AMD_Radeon_R9700", "AMD_Radeon_8060S"
ROW = {"phase": "decode", "BLOCK_N": 1}


def document(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "kernel": "nl4_gemm",
        "shape": {"N": 2560, "K": 4096},
        "device": R9700,
        "arch": "gfx1201",
        "source": "modelled, not measured",
        "method": "test",
        "date": "2026-01-01",
        "versions": {"torch": "2.13.0"},
        "driver": "6.14.0",
        "configs": {"8": ROW, "1": ROW},
    } | changes


def put(folder: Path, **changes: Any) -> Path:
    path = folder / f"N=2560,K=4096,device_name={R9700},dtype=nl4.json"
    path.write_text(json.dumps(document(**changes)))
    return path


def test_a_right_file(tmp_path: Path) -> None:
    path = put(tmp_path)
    found = read_file("nl4_gemm", path)
    assert (found.path, found.shape, found.arch) == (path, {"N": 2560, "K": 4096}, "gfx1201")
    assert (found.source, list(found.configs)) == ("modelled, not measured", [1, 8])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 2}, "schema is 2.*reads 1"),
        ({"kernel": "nl4_moe"}, "kernel is 'nl4_moe'"),
        ({"shape": {"N": 2560, "K": 2048}}, "shape.K is 2048.*4096"),
        ({"shape": {"N": 2560}}, "shape.K is None"),
        ({"shape": {"N": 2560, "K": 4096.0}}, "shape must give whole numbers"),
        ({"shape": [2560, 4096]}, "shape must"),
        ({"device": STRIX}, f"device is '{STRIX}'.*{R9700}"),
        ({"arch": 1201}, "arch must be text"),
        ({"source": "guessed"}, "source is 'guessed'"),
        ({"versions": "2.13"}, "versions must be an object"),
        ({"driver": 6}, "driver must be text or null"),
        ({"comment": "x"}, "comment is not a key"),
        ({"configs": {}}, "configs must hold"),
        ({"configs": [ROW]}, "configs must hold"),
        ({"configs": {"0": ROW}}, "configs.0: the key"),
        ({"configs": {"01": ROW}}, "configs.01: the key"),
        ({"configs": {"one": ROW}}, "configs.one: the key"),
        ({"configs": {"1": 5}}, "configs.1.phase is 5"),
        ({"configs": {"1": {"BLOCK_N": 1}}}, "configs.1.phase is None"),
        ({"configs": {"1": {"phase": "both"}}}, "configs.1.phase is 'both'"),
        ({"configs": {"1": ROW, "4": ROW | {"BLOCK_N": 1.5}}}, "configs.4.BLOCK_N must be a whole number.*1.5"),
        ({"configs": {"1": ROW | {"BLOCK_N": True}}}, "configs.1.BLOCK_N"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = put(tmp_path, **changes)
    with pytest.raises(TuningFileError, match=words) as failure:
        read_file("nl4_gemm", path)
    assert str(path) in str(failure.value)


@pytest.mark.parametrize("key", list(document()))
def test_every_key_is_needed(tmp_path: Path, key: str) -> None:
    path = put(tmp_path)
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    with pytest.raises(TuningFileError, match=rf"{key} is"):
        read_file("nl4_gemm", path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1, "schema": 1}', "\xff"])
def test_a_file_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    path = put(tmp_path)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(TuningFileError) as failure:
        read_file("nl4_gemm", path)
    assert str(path) in str(failure.value)


def test_a_file_of_another_name(tmp_path: Path) -> None:
    path = put(tmp_path).rename(tmp_path / "N=2560.json")
    with pytest.raises(TuningFileError, match="no file name of nl4_gemm"):
        read_file("nl4_gemm", path)


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(TuningFileError, match=r"absent.*cannot be read: No such file"):
        read_file("nl4_gemm", tmp_path / "absent.json")
