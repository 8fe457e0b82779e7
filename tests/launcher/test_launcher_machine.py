"""Hardware from recorded trees, sizes with units, the configuration folder."""

from pathlib import Path
from typing import Any

import pytest

from step128_launcher.configs_dir import CONFIGS_DIR_VARIABLE, find_configs_dir
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.hardware import parse_cpu_list, probe
from step128_launcher.planning.profile_checks import parse_size

MACHINES = Path(__file__).parents[1] / "machines"


def test_recorded_machine_without_limits() -> None:
    found = probe(MACHINES / "no-gpu")
    assert found.cpu_ids == (0, 1) and found.cpu_quota is None and found.usable_cpus == 2
    assert found.memory_available_bytes == 24125848 * 1024
    assert (found.cgroup_version, found.cgroup_limit_bytes) == (1, None)
    assert not found.has_gpu


def test_container_limits_bind() -> None:
    found = probe(MACHINES / "container-6gib")
    assert found.cpu_ids == (0, 1, 2, 3, 8, 10, 11)
    assert found.cpu_quota == found.usable_cpus == 2.5
    assert (found.cgroup_version, found.cgroup_limit_bytes) == (2, 6 << 30)
    # 6 GiB less the 3 GiB in use, of which 1 GiB is droppable page cache.
    assert found.memory_available_bytes == 4 << 30


def test_gpu_node_is_seen() -> None:
    found = probe(MACHINES / "gpu-node")
    assert found.has_gpu and found.has_amd_gpu and found.cgroup_version is None


def test_no_proc_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(LauncherError, match="MemAvailable") as caught:
        probe(tmp_path)
    assert caught.value.exit_code == ExitCode.UNSUPPORTED_HARDWARE


@pytest.mark.parametrize(("text", "cpus"), [("0", (0,)), ("0-2,5", (0, 1, 2, 5)), ("", ())])
def test_cpu_lists(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpu_list(text) == cpus


@pytest.mark.parametrize(("text", "count"), [("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("7B", 7), ("2KiB", 2048)])
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["512", "4GB", "GiB", 5, None, ""])
def test_sizes_need_a_unit(text: Any) -> None:
    with pytest.raises(ValueError, match="unit"):
        parse_size(text)


def test_configs_dir_override(tmp_path: Path) -> None:
    assert find_configs_dir({CONFIGS_DIR_VARIABLE: str(tmp_path)}) == tmp_path
    with pytest.raises(LauncherError, match="not a folder") as caught:
        find_configs_dir({CONFIGS_DIR_VARIABLE: str(tmp_path / "none")})
    assert caught.value.exit_code == ExitCode.BAD_CONFIGURATION
