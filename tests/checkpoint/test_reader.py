"""Input files that are missing, damaged, unreadable or no files at all: each a sentence that names it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step128_checkpoint.cli import main
from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.reader import open_checkpoint


def quantize(source: Path, out: Path) -> int:
    return main(["quantize", "--method", "mse", str(source), str(out)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing shard", "model-00002-of-00002.safetensors: this shard is missing"),
        ("truncated shard", "model-00002-of-00002.safetensors: truncated: tensor "),
        ("short header", "model-00002-of-00002.safetensors: not a safetensors file, or cut short"),
        ("wrong shape", "the header gives it"),
        ("misplaced tensor", "promises it here"),
        ("stray shard", "extra.safetensors is not named in"),
        ("shard is a folder", "model-00002-of-00002.safetensors: not a file"),
        ("index is a folder", "model.safetensors.index.json: cannot be read: Is a directory"),
        ("config is a folder", "config.json: cannot be read: Is a directory"),
        ("nested config", "config.json: nested more than 50 levels deep"),
        ("nested far too deep", "config.json: nested more than 50 levels deep"),
        ("endless number", "config.json: not valid JSON"),
        ("placed in no file", "is placed in 5, which is no file name"),
    ],
)
def test_bad_input_names_file_and_tensor(
    make_checkpoint: Callable[..., Path], tmp_path: Path, damage: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint()
    shard = source / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    if damage == "missing shard":
        shard.unlink()
    elif damage == "truncated shard":
        shard.write_bytes(data[:-100])
    elif damage == "short header":
        shard.write_bytes(data[:50])
    elif damage == "wrong shape":
        shard.write_bytes(data.replace(b"[32, 64]", b"[32, 63]", 1))
    elif damage == "misplaced tensor":
        index = source / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("lm_head.weight", "lm_tail.weight"))
    elif damage == "stray shard":
        (source / "extra.safetensors").write_bytes(data)
    elif damage == "placed in no file":
        index = source / "model.safetensors.index.json"
        index.write_text(index.read_text().replace('"model-00002-of-00002.safetensors"', "5", 1))
    elif damage.endswith("is a folder"):
        names = {"shard": shard.name, "index": "model.safetensors.index.json", "config": "config.json"}
        path = source / names[damage.split()[0]]
        path.unlink()
        path.mkdir()
    else:
        depth = 100 if damage == "nested config" else 100_000
        text = "1" * 5000 if damage == "endless number" else "[" * depth + "]" * depth
        (source / "config.json").write_text(f'{{"architectures": {text}}}')
    assert quantize(source, tmp_path / "out") == 65
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16"]


def test_input_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(tmp_path / "nothing", tmp_path / "out") == 66
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00002.safetensors"])
def test_unreadable_input_is_5(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *arguments, **options)

    source = make_checkpoint()
    monkeypatch.setattr(Path, "open", refuse)
    for command in (["inspect", str(source)], ["quantize", "--method", "mse", str(source), str(tmp_path / "out")]):
        assert main(command) == 5
        assert f"{name}: cannot be read: permission denied" in capsys.readouterr().err


def test_file_that_shrinks_while_read_is_an_error(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(make_checkpoint())
    with checkpoint:
        path = checkpoint.tensors["lm_head.weight"].path
        os.truncate(path, 100)
        with pytest.raises(CheckpointError, match="changed while being read"):
            checkpoint.read("lm_head.weight")
