"""What a user gets for a bad checkpoint, a taken port or too little memory: an exit code and a sentence, in a second.

Each case changes a real quantized checkpoint as an accident would, and runs the command a user would run.
"""

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

Cli = Callable[..., subprocess.CompletedProcess[str]]
VICTIM = "model.layers.4.moe.down_proj.weight_packed"


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def rename(folder: Path, old: str, new: str) -> None:
    """Misname a tensor, in its shard and in the index, as a faulty export would."""
    shard = shard_of(folder, old)
    tensors = load_file(shard)
    tensors[new] = tensors.pop(old)
    save_file(tensors, shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(f'"{old}"', f'"{new}"'))


def missing_shard(folder: Path) -> None:
    shard_of(folder, VICTIM).unlink()


def truncated_shard(folder: Path) -> None:
    shard = shard_of(folder, VICTIM)
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)


def wrong_dtype(folder: Path) -> None:
    shard = shard_of(folder, VICTIM)
    tensors = load_file(shard)
    tensors[VICTIM] = tensors[VICTIM].float()
    save_file(tensors, shard, metadata={"format": "pt"})


def unknown_quant_method(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "nl5"
    (folder / "config.json").write_text(json.dumps(config))


def other_codebook(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["codebook"][0] = -128
    (folder / "config.json").write_text(json.dumps(config))


def misnamed_tensor(folder: Path) -> None:
    rename(folder, VICTIM, VICTIM.replace("down_proj", "donw_proj"))


def missing_mtp_layer(folder: Path) -> None:
    rename(folder, "model.layers.10.eh_proj.weight", "model.layers.13.eh_proj.weight")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


CASES = [
    (missing_shard, 65, "model-00001-of-"),
    (truncated_shard, 65, "model-00001-of-"),
    (wrong_dtype, 65, VICTIM),
    (unknown_quant_method, 65, "nl5"),
    (other_codebook, 65, "codebook"),
    (misnamed_tensor, 65, "donw_proj"),
    (missing_mtp_layer, 65, "model.layers.10.eh_proj.weight"),
    (no_config, 66, "config.json"),
]


@pytest.fixture
def copy(quantized: Callable[..., Path], tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(quantized(), target)
    return target


@pytest.mark.parametrize(("damage", "code", "says"), CASES, ids=[case[0].__name__ for case in CASES])
def test_damaged_checkpoint(
    cli: Cli, copy: Path, tmp_path: Path, damage: Callable[[Path], None], code: int, says: str
) -> None:
    damage(copy)
    before = sorted(path.name for path in tmp_path.iterdir())
    for command in (("plan", copy), ("serve", copy, "--state-dir", tmp_path / "state")):
        result = cli("step128", *command, "--profile", "cpu")
        assert result.returncode == code, result.stderr
        assert says in result.stderr
        assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("damage", [truncated_shard, missing_shard])
def test_quantize_and_dequantize_refuse_it_and_leave_nothing(
    cli: Cli, copy: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(copy)
    result = cli("step128-checkpoint", "dequantize", copy, tmp_path / "out")
    assert result.returncode == 65, result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_port_in_use(cli: Cli, quantized: Callable[..., Path], tmp_path: Path, taken_port: int) -> None:
    options = ("--profile", "cpu", "--state-dir", tmp_path / "state", "--metrics-port", "0")
    result = cli("step128", "serve", quantized(), *options, "--port", taken_port)
    assert result.returncode == 75, result.stderr
    assert str(taken_port) in result.stderr
    assert "Traceback" not in result.stderr


def test_too_little_memory(cli: Cli, quantized: Callable[..., Path], tmp_path: Path) -> None:
    options = ("--profile", "cpu", "--memory", "1GiB", "--state-dir", tmp_path / "state")
    result = cli("step128", "serve", quantized(), *options)
    assert result.returncode == 3, result.stderr
    output = result.stdout + result.stderr
    assert "KV cache" in output
    assert "Traceback" not in output
    assert not (tmp_path / "state").exists()


def test_no_such_folder(cli: Cli, tmp_path: Path) -> None:
    result = cli("step128", "plan", tmp_path / "nowhere")
    assert result.returncode == 66
    assert "nowhere" in result.stderr
