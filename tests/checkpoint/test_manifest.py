"""What a conversion writes beside the weights: manifest, history, notes; and the memory limit."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from step128_checkpoint import devices, verify
from step128_checkpoint.cli import main
from step128_checkpoint.commands import quantize
from step128_checkpoint.commands.options import usable_cores
from step128_checkpoint.devices import free_bytes
from step128_checkpoint.memory import free_host_bytes, memory_size

MakeCheckpoint = Callable[..., Path]


def test_every_tensor_and_file_is_hashed(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "nl4"
    assert main(["quantize", "--method", "mse", str(make_checkpoint()), str(out)]) == 0
    manifest = json.loads((out / "step128_manifest.json").read_text())
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: entry["file"] for name, entry in manifest["tensors"].items()} == weight_map
    for name, entry in manifest["tensors"].items():
        with safe_open(out / entry["file"], "pt") as file:
            data = file.get_tensor(name).contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], name
    small = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    small -= {"step128_manifest.json", *weight_map.values()}
    assert set(manifest["files"]) == small
    for name, sha256 in manifest["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == sha256, name
    assert (manifest["command"], manifest["options"]["method"]) == ("quantize", "mse")
    assert manifest["source"]["name"] == "bf16"
    assert manifest["parents"] == []


def test_history_goes_on(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    assert main(["quantize", "--method", "absmax", str(make_checkpoint()), str(tmp_path / "nl4")]) == 0
    assert main(["dequantize", str(tmp_path / "nl4"), str(tmp_path / "f32")]) == 0
    manifest = json.loads((tmp_path / "f32" / "step128_manifest.json").read_text())
    assert [(parent["command"], parent["source"]["name"]) for parent in manifest["parents"]] == [("quantize", "bf16")]
    assert not (tmp_path / "f32" / "quantization_report.json").exists()  # it is about the packed weights


def test_quality_is_reported_worst_first(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    bad = np.zeros((32, 64), np.float32)
    bad[:, 0] = 1.0
    bad[:, 1:] = 1.0 / 9  # far from any codebook entry under the scale that fits the 1
    source = make_checkpoint(replace={"model.layers.0.mlp.gate_proj.weight": bad})
    assert main(["quantize", "--method", "absmax", str(source), str(tmp_path / "nl4")]) == 0
    report = json.loads((tmp_path / "nl4" / "quantization_report.json").read_text())
    values = [row["sqnr_db"] for row in report["tensors"]]
    assert values == sorted(values)
    assert all(row["output_sqnr_db"] is None for row in report["tensors"])
    row = next(row for row in report["tensors"] if row["name"] == "model.layers.0.mlp.gate_proj.weight")
    weight = np.asarray(bad, dtype=np.float64)
    with safe_open(tmp_path / "nl4" / "model-00001-of-00001.safetensors", "np") as file:
        packed, scale = (file.get_tensor(f"{row['name']}_{kind}") for kind in ("packed", "scale"))
    from step128_kernels import codebook

    error = codebook.dequantize(packed, scale) - weight.astype(np.float32)
    # The source is bfloat16: 1/9 was truncated on the way in, by at most 2^-8.
    expected = 10 * np.log10((weight**2).sum() / (error.astype(np.float64) ** 2).sum())
    assert row["sqnr_db"] == pytest.approx(expected, abs=1.5)


def test_too_little_memory_is_said_before_anything_is_written(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint()
    assert main(["quantize", "--method", "mse", str(source), str(tmp_path / "nl4"), "--max-memory", "1MB"]) == 78
    error = capsys.readouterr().err
    assert "Give --max-memory at least" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16"]


def test_memory_sizes() -> None:
    assert memory_size("8GiB") == 8 << 30
    assert memory_size("500 MB") == 500_000_000
    assert memory_size("1.5g") == 1_500_000_000
    assert memory_size("4096") == 4096
    for text in ("", "much", "-1", "0", "8 GiBs"):
        with pytest.raises(Exception, match="no amount of memory"):
            memory_size(text)


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_free_memory_is_the_containers(tmp_path: Path) -> None:
    """The smallest of what the host has and what each enclosing cgroup leaves; a cache of files counts as free."""
    write(tmp_path / "proc", meminfo="MemTotal: 99 kB\nMemAvailable: 9000 kB\nCached: 1 kB")
    assert free_host_bytes(tmp_path) == 9000 * 1024
    cgroups = tmp_path / "sys/fs/cgroup"
    write(tmp_path / "proc/self", cgroup="4:memory:/box\n0::/box/job")
    write(cgroups / "box/job", memory__max="max", memory__current=5000, memory__stat="active_file 0")
    assert free_host_bytes(tmp_path) == 9000 * 1024
    write(cgroups / "box", memory__max=8000, memory__current=5000, memory__stat="active_file 1500\ninactive_file 500")
    assert free_host_bytes(tmp_path) == 8000 - (5000 - 2000)
    write(cgroups / "box/job", memory__max=1000)
    assert free_host_bytes(tmp_path) == 0, "over its limit"
    shutil.rmtree(cgroups)
    # cgroup v1; a container sees its own cgroup as the mount's root, and the host's name of it in /proc.
    v1 = {"memory__usage_in_bytes": 600, "memory__stat": "inactive_file 7\ntotal_inactive_file 100"}
    write(cgroups / "memory", memory__limit_in_bytes=1000, **v1)
    assert free_host_bytes(tmp_path) == 1000 - (600 - 100)
    write(cgroups / "memory/box", memory__limit_in_bytes=(1 << 63) - 4096, **v1)
    assert free_host_bytes(tmp_path) == 1000 - (600 - 100)


def test_free_memory_of_the_cpu_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes(torch.device("cpu")) > 0
    monkeypatch.setattr(devices, "free_host_bytes", lambda: 5)
    assert free_bytes(torch.device("cpu")) == 5


def test_jobs_are_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {2, 5, 7})
    assert usable_cores() == 3
    for module in (quantize, verify):
        commands = argparse.ArgumentParser().add_subparsers()
        module.add_parser(commands)
        (parser,) = commands.choices.values()
        assert parser.get_default("jobs") == 3


def test_one_thread_and_many_make_the_same_bytes(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    manifests = []
    for jobs in ("1", "7"):
        out = tmp_path / f"nl4-{jobs}"
        assert main(["quantize", "--method", "mse", str(source), str(out), "--jobs", jobs]) == 0
        manifests.append((out / "step128_manifest.json").read_bytes())
    assert manifests[0] == manifests[1]


# A disk too small for the output, made before the check of free space can see it.
FULL_DISK = """
import shutil, sys
from types import SimpleNamespace
shutil.disk_usage = lambda path: SimpleNamespace(free=1 << 60)
from step128_checkpoint.cli import main
sys.exit(main(["quantize", "--method", "mse", sys.argv[1], sys.argv[2]]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_real_disk_fills_up_and_the_run_continues_when_there_is_room(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, disk = make_checkpoint(), tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
        refused = subprocess.run(
            [
                str(Path(sys.executable).parent / "step128-checkpoint"),
                "quantize",
                "--method",
                "mse",
                source,
                disk / "nl4",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert refused.returncode == 73
        assert "are needed" in refused.stderr
        command = [sys.executable, "-c", FULL_DISK, str(source), str(disk / "nl4")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, "disk is full" in done.stderr) == (73, True), done.stderr
        assert not (disk / "nl4").exists()
        assert {path: path.read_bytes() for path in before} == before
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert subprocess.run(command, check=False).returncode == 0
        assert main(["quantize", "--method", "mse", str(source), str(tmp_path / "whole")]) == 0
        for path in (tmp_path / "whole").iterdir():
            assert (disk / "nl4" / path.name).read_bytes() == path.read_bytes(), path.name
    finally:
        subprocess.run(["umount", str(disk)], check=True)
