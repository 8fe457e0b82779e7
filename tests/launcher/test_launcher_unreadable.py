"""Each file of a machine's tree missing, unreadable or absurd, one at a time: only the facts in it are lost."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.hardware import probe
from step128_launcher.machine.types import Hardware

MACHINES = Path(__file__).parents[1] / "machines"
TREES = ("r9700-plus-igpu", "strix-halo-lxc", "container-6gib", "no-gpu", "dgx-spark")
LINK = {"link"}
CGROUP = {"memory_available_bytes", "cgroup_limit_bytes", "cgroup_version", "cpu_quota"}
# File -> what may change when it is spoiled; a file that is not named here may change nothing.
FACTS: dict[str, set[str]] = {
    "mem_info_vram_total": {"vram_total_bytes", "vram_used_bytes"},
    "mem_info_vram_used": {"vram_used_bytes"},
    "mem_info_vis_vram_total": {"visible_vram_bytes"},
    "mem_info_gtt_total": {"gtt_total_bytes", "gtt_used_bytes"},
    "mem_info_gtt_used": {"gtt_used_bytes"},
    "current_link_speed": LINK,
    "current_link_width": LINK,
    "max_link_speed": LINK,
    "max_link_width": LINK,
    "numa_node": {"numa_node"},
    "power1_cap": {"power_cap_watts"},
    "unique_id": {"unique_id"},
    "type": {"iommu_domain"},
    "device": {"pci_id", "name"},
    "vbios_version": {"firmware"},
    "mec_fw_version": {"firmware"},
    "mes_fw_version": {"firmware"},
    "properties": {"target", "compute_units", "kfd_node"},
    "pages_limit": {"ttm_limits"},
    "status": {"cpu_ids", "groups"},
    "osrelease": {"kernel_release"},
    "cmdline": {"kernel_command_line"},
    "shm_bytes": {"shm_bytes"},
    "kfd": {"has_amd_gpu", "device_nodes"},
    "nvidiactl": {"has_nvidia_gpu", "device_nodes"},
    "version": {"firmware"},
    "librccl.so.1.0.70201": {"firmware"},
    "container": {"container"},
    "nvidia-smi.csv": {"gpus", "firmware"},
    **{name: {"device_nodes"} for name in ("renderD128", "renderD129", "nvidia0", "nvidia-uvm")},
    **dict.fromkeys(["cgroup", "cgroup.controllers", "memory.max", "memory.current", "memory.stat", "cpu.max"], CGROUP),
    **dict.fromkeys(["memory.limit_in_bytes", "memory.usage_in_bytes"], CGROUP),
    **dict.fromkeys(["cpu.cfs_quota_us", "cpu.cfs_period_us"], CGROUP),
}
# Files whose content is a figure: what cannot be one must be said.
FIGURES = {"mem_info_vram_total", "mem_info_gtt_total", "power1_cap", "pages_limit", "shm_bytes"}
SPOILS: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "garbage": b"\xff\xfe\x00 \xd9\xa3 not-a-number",
    "all ones": b"18446744073709551615\n",
    "0xFFFF": b"65535\n",
    "negative": b"-1\n",
}


def facts(hardware: Hardware) -> dict[str, Any]:
    """Every fact of a machine by name, one entry a GPU; without the notes."""
    found = asdict(hardware)
    del found["unreadable"]
    gpus = found.pop("gpus")
    found["gpus"] = [gpu["pci_address"] for gpu in gpus]
    for number, gpu in enumerate(gpus):
        found |= {f"{number}.{name}": value for name, value in gpu.items()}
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    if before["gpus"] != after["gpus"]:  # the GPUs' own facts went with them
        before, after = ({k: v for k, v in one.items() if "." not in k} for one in (before, after))
    return {name.rpartition(".")[2] for name in before if before[name] != after[name]}


@pytest.fixture(params=TREES)
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    copy = tmp_path / request.param
    shutil.copytree(MACHINES / request.param, copy, symlinks=True)
    return copy


def spoilable(tree: Path) -> Iterator[Path]:
    for path in sorted(tree.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.name not in ("ORIGIN", "meminfo"):
            yield path


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_spoiled_file_costs_its_own_facts_only(tree: Path, spoil: str) -> None:
    before, content = probe(tree, {}), SPOILS[spoil]
    assert before.unreadable == ()
    for path in spoilable(tree):
        kept = path.read_bytes()
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        after = probe(tree, {})
        path.write_bytes(kept)
        lost = changed(facts(before), facts(after))
        assert lost <= FACTS.get(path.name, set()), (path, lost)
        said = [line for line in after.unreadable if path.name in line]
        if content is None:
            assert not said, path
        elif path.name in FIGURES and spoil in ("empty", "garbage", "all ones", "negative"):
            assert said, path


def test_an_unreadable_file_costs_its_own_facts_only_and_is_named(tree: Path) -> None:
    """A folder in the file's place: reading fails with an error other than "not there", for root too."""
    before = probe(tree, {})
    for path in spoilable(tree):
        kept = path.read_bytes()
        path.unlink()
        path.mkdir()
        after = probe(tree, {})
        path.rmdir()
        path.write_bytes(kept)
        lost = changed(facts(before), facts(after))
        assert lost <= FACTS.get(path.name, set()), (path, lost)
        cgroup_or_node = FACTS.get(path.name) in (CGROUP, {"device_nodes"})
        if lost - {"has_amd_gpu", "has_nvidia_gpu", "device_nodes"} and not cgroup_or_node:
            assert any(path.name in line and "directory" in line for line in after.unreadable), path


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_machine_whose_memory_is_unknown_is_refused(tmp_path: Path, spoil: str) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(MACHINES / "single-r9700", tree, symlinks=True)
    path, content = tree / "proc/meminfo", SPOILS[spoil]
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(LauncherError, match="MemAvailable") as caught:
        probe(tree, {})
    assert caught.value.exit_code == ExitCode.UNSUPPORTED_HARDWARE


def test_folders_that_may_not_be_entered(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking whether a file exists fails too, where its folder may not be entered."""
    real = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        if path.name in (
            "kubernetes.io",
            "kfd",
            ".containerenv",
            "gpu_busy_percent",
            "cgroup.controllers",
            "nvidiactl",
        ):
            raise PermissionError(13, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    found = probe(tree, {})
    assert not found.has_gpu and found.cgroup_version in (None, 1)


def test_a_card_that_fell_off_the_bus_is_still_listed(tmp_path: Path) -> None:
    """All of a card's files answer all ones: the card is there, and nothing of it is believed."""
    tree = tmp_path / "tree"
    shutil.copytree(MACHINES / "quad-r9700", tree, symlinks=True)
    device = (tree / "sys/class/drm/card2/device").resolve()
    for path in device.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.name != "uevent":
            path.write_text("0xffff\n" if path.name in ("vendor", "device") else "4294967295\n")
    found = probe(tree, {})
    gpu = found.gpus[2]
    assert len(found.gpus) == 4 and gpu.pci_address == "0000:43:00.0"
    assert gpu.numa_node is None and gpu.target == "gfx1201" and not gpu.integrated
    assert any("current_link_speed" in line for line in found.unreadable)
