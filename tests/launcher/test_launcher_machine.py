"""Hardware from recorded trees, profiles from YAML, the configuration folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from step128_launcher.configs_dir import CONFIGS_DIR_VARIABLE, find_configs_dir
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.hardware import parse_cpu_list, probe
from step128_launcher.profiles import list_profiles, load_profile, parse_size

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


def test_every_shipped_profile_loads(configs_dir: Path) -> None:
    assert "cpu" in list_profiles(configs_dir)
    for name in list_profiles(configs_dir):
        assert load_profile(configs_dir, name).name == name


def _set(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


BAD_PROFILES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown key": (_set("memory", "swap", value="1GiB"), "unknown key memory.swap"),
    "missing key": (lambda document: document["vllm"].pop("dtype"), "the key vllm.dtype is missing"),
    "size without unit": (_set("memory", "reserve", value=512), "memory.reserve needs a size with its unit"),
    "fraction too large": (_set("memory", "usable_fraction", value=1.5), "memory.usable_fraction needs a number"),
    "text for a number": (_set("limits", "max_num_seqs", value="many"), "limits.max_num_seqs needs a whole number"),
    "number for a flag": (_set("vllm", "enforce_eager", value=1), "vllm.enforce_eager needs true or false"),
    "unknown dtype": (_set("vllm", "dtype", value="int4"), "vllm.dtype needs one of bfloat16, float32, found 'int4'"),
    "odd block size": (_set("vllm", "block_size", value=100), "vllm.block_size needs a multiple of 32"),
    "limits crossed": (_set("limits", "min_model_len", value=99999), "limits.min_model_len"),
    "section is a list": (_set("limits", value=[]), "limits needs a mapping"),
}


@pytest.mark.parametrize("case", BAD_PROFILES)
def test_bad_profiles_are_refused_by_key(case: str, configs_dir: Path, tmp_path: Path) -> None:
    change, wanted = BAD_PROFILES[case]
    document = yaml.safe_load((configs_dir / "profiles" / "cpu.yaml").read_text())
    change(document)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(LauncherError) as caught:
        load_profile(tmp_path, "mine")
    assert caught.value.exit_code == ExitCode.BAD_CONFIGURATION
    assert wanted in caught.value.message and "mine.yaml" in caught.value.message


def test_unreadable_yaml_and_unknown_profile(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.yaml").write_text("a: [")
    for name, text in (("mine", "cannot be read"), ("other", "no profile 'other'")):
        with pytest.raises(LauncherError, match=text) as caught:
            load_profile(tmp_path, name)
        assert caught.value.exit_code == ExitCode.BAD_CONFIGURATION


def test_configs_dir_override(tmp_path: Path) -> None:
    assert find_configs_dir({CONFIGS_DIR_VARIABLE: str(tmp_path)}) == tmp_path
    with pytest.raises(LauncherError, match="not a folder") as caught:
        find_configs_dir({CONFIGS_DIR_VARIABLE: str(tmp_path / "none")})
    assert caught.value.exit_code == ExitCode.BAD_CONFIGURATION
