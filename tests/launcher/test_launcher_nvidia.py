"""NVIDIA's GPUs, by the tool of its driver."""

import shutil
from pathlib import Path

import pytest

from step128_launcher.hardware import probe
from step128_launcher.machine import nvidia
from step128_launcher.machine.reader import Reader
from step128_launcher.machine.types import PcieLink

MACHINES = Path(__file__).parents[1] / "machines"
MIB = 2**20
CARD = (
    "00000000:01:00.0, 0x2BB410DE, NVIDIA RTX PRO 6000, GPU-1234, 12.0, 97887, 512, 600.00, 5, 5, 16, 16, 580.1, 98.0"
)


def _nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Reader:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return Reader(Path("/"))


def test_nvidia_card_by_its_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = _nvidia_smi(tmp_path, monkeypatch, f"echo '{CARD}'")
    (gpu,), versions = nvidia.read_nvidia_gpus(reader, has_driver=True)
    assert (gpu.pci_address, gpu.pci_id, gpu.target, gpu.integrated) == ("0000:01:00.0", "10de:2bb4", "sm_120", False)
    assert (gpu.vram_total_bytes, gpu.vram_used_bytes, gpu.power_cap_watts) == (97887 * MIB, 512 * MIB, 600.0)
    assert gpu.link == PcieLink(32.0, 16, 32.0, 16) and reader.notes == []
    assert versions == {"nvidia": "580.1", "0000:01:00.0 vbios": "98.0"}


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'Driver/library version mismatch'; exit 18", "exit 18: Driver/library version mismatch"),
        ("exec sleep 30", "timed out"),
        ("echo 'No devices were found'", "is not the answer"),
    ],
)
def test_nvidias_tool_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str) -> None:
    monkeypatch.setattr(nvidia, "_TIMEOUT_SECONDS", 0.3)
    reader = _nvidia_smi(tmp_path, monkeypatch, script)
    assert nvidia.read_nvidia_gpus(reader, has_driver=True) == ((), {})
    assert len(reader.notes) == 1 and said in reader.notes[0]


def test_nvidias_tool_is_not_run_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = _nvidia_smi(tmp_path, monkeypatch, f"echo '{CARD}'")
    assert nvidia.read_nvidia_gpus(reader, has_driver=False) == ((), {})
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert nvidia.read_nvidia_gpus(reader, has_driver=True) == ((), {})
    assert "No such file" in reader.notes[0]


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        (" 97887,", " [Unknown Error],", "vram_total_bytes"),
        (" 600.00,", " [Unknown Error],", "power_cap_watts"),
        (" 12.0,", " ?,", "target"),
        (" 5, 5, 16,", " 99, 5, 16,", "link"),
    ],
)
def test_one_bad_field_of_nvidias_answer_costs_that_field(tmp_path: Path, old: str, new: str, lost: str) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(MACHINES / "dgx-spark", tree)
    (tree / nvidia.RECORDED).write_text(CARD.replace(old, new) + "\n")
    found = probe(tree, {})
    (gpu,) = found.gpus
    assert getattr(gpu, lost) is None and not gpu.integrated and gpu.name == "NVIDIA RTX PRO 6000"
    assert len(found.unreadable) == 1 and "0000:01:00.0" in found.unreadable[0]


def test_unified_memory_by_the_gpus_capability_too(tmp_path: Path) -> None:
    """A future driver may answer with a figure where today's says [N/A]; it still is the host's memory."""
    tree = tmp_path / "tree"
    shutil.copytree(MACHINES / "dgx-spark", tree)
    (tree / nvidia.RECORDED).write_text(CARD.replace(" 12.0,", " 12.1,") + "\n")
    (gpu,) = probe(tree, {}).gpus
    assert gpu.integrated and gpu.vram_total_bytes is None


@pytest.mark.parametrize(("value", "visible"), [("", 0), ("0", 1), ("GPU-1234", 1), ("1", 0), ("MIG-1", 1)])
def test_cuda_visible_devices(tmp_path: Path, value: str, visible: int) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(MACHINES / "dgx-spark", tree)
    (tree / nvidia.RECORDED).write_text(CARD + "\n")
    found = probe(tree, {"CUDA_VISIBLE_DEVICES": value, "HIP_VISIBLE_DEVICES": "5"})
    assert len(found.usable_gpus) == visible
    assert any("MIG-1" in line for line in found.unreadable) == (value == "MIG-1")
