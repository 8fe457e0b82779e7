"""Profiles: each file loads, a bad one is refused by file and key, and each recorded machine gets the right one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.planning.profiles import (
    Profile,
    choose_profile,
    load_profile,
    matching_gpus,
    profile_files,
    user_profiles_dir,
    why_not,
)

MACHINES = Path(__file__).parents[1] / "machines"
REAL_MODEL = Path(__file__).parents[1] / "data" / "step-3.7-flash-240"
CHOSEN = {
    "quad-r9700": "quad-r9700",
    "quad-48gb": "quad-48gb",
    "single-r9700": "single-r9700",
    "r9700-plus-igpu": "single-r9700",
    "strix-halo-128-default": "strix-halo-128",
    "strix-halo-128-gtt120": "strix-halo-128",
    "strix-halo-128-carveout96": "strix-halo-128",
    "strix-halo-lxc": "strix-halo-128",
    "dgx-spark": "dgx-spark",
    "jetson-thor": "jetson-thor",
    "no-gpu": "cpu",
    "container-6gib": "cpu",
}
Recorded = Callable[[str], Hardware]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def profiles(configs_dir: Path) -> dict[str, Profile]:
    return {name: load_profile(configs_dir, name) for name in profile_files(configs_dir)}


@pytest.fixture(autouse=True)
def no_user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEP128_PROFILES_DIR", str(tmp_path / "own"))
    monkeypatch.delenv("STEP128_PROFILE", raising=False)


def test_every_shipped_profile_loads(profiles: dict[str, Profile]) -> None:
    assert set(profiles) == {*CHOSEN.values(), "quad-r9600"}
    for name, profile in profiles.items():
        assert profile.name == name and profile.description
        if profile.device != "cpu":
            # vLLM's recipe for this model, and a backend that is named: vLLM's own choice is never left to chance.
            assert "--disable-cascade-attn" in profile.arguments and profile.attention_backends
            assumptions = (profile.runtime_context, profile.collectives, profile.graphs, profile.memory_bandwidth)
            assert all(assumption is not None and assumption.source for assumption in assumptions)
        if profile.device == "rocm":
            assert dict(profile.environment)["VLLM_ROCM_USE_AITER"] == "0"
            if profile.match_gpus > 1:
                assert {("NCCL_PROTO", "Simple"), ("NCCL_P2P_DISABLE", "1")} <= set(profile.environment)


def test_every_recorded_machine_has_an_answer() -> None:
    assert {path.name for path in MACHINES.iterdir() if path.is_dir()} - set(CHOSEN) == {"gpu-node"}


@pytest.mark.parametrize("machine", CHOSEN)
def test_the_profile_for_each_machine(machine: str, profiles: dict[str, Profile], recorded: Recorded) -> None:
    hardware = recorded(machine)
    assert choose_profile(profiles, hardware) == CHOSEN[machine]
    assert why_not(profiles[CHOSEN[machine]], hardware) is None
    others = [name for name in profiles if name not in (CHOSEN[machine], "single-r9700")]
    assert all(why_not(profiles[name], hardware) for name in others)


def test_a_machine_that_no_profile_is_for(profiles: dict[str, Profile], recorded: Recorded) -> None:
    with pytest.raises(LauncherError, match=r"quad-r9700: needs 4 x gfx1201; found no GPU") as caught:
        choose_profile(profiles, recorded("gpu-node"))
    assert caught.value.exit_code == ExitCode.UNSUPPORTED_HARDWARE and "--profile cpu" in caught.value.hint


def test_an_integrated_gpu_beside_a_card_is_never_counted(profiles: dict[str, Profile], recorded: Recorded) -> None:
    hardware = recorded("r9700-plus-igpu")
    assert len(hardware.gpus) == 2
    for profile in profiles.values():
        assert all(not gpu.integrated for gpu in matching_gpus(profile, hardware))


def _set(*path: str, value: Any) -> Change:
    def change(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


def _without(*path: str) -> Change:
    def change(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        del document[path[-1]]

    return change


BAD: dict[str, tuple[Change, str]] = {
    "unknown key": (_set("memory", "swap", value="1GiB"), "unknown key memory.swap"),
    "unknown section": (_set("gpu", value={}), "unknown key gpu"),
    "missing key": (_without("vllm", "dtype"), "the key vllm.dtype is missing"),
    "missing section": (_without("limits"), "the key limits is missing"),
    "figure without source": (
        _set("memory", "reserve", value="1GiB"),
        "memory.reserve needs a mapping of value and source",
    ),
    "size without unit": (
        _set("memory", "reserve", value={"value": 512, "source": "x"}),
        "memory.reserve needs a mapping of value (a size with its unit",
    ),
    "decimal unit": (_set("match", "memory", value="30GB"), "match.memory needs a size with its unit"),
    "fraction too large": (
        _set("memory", "usable_fraction", value={"value": 1.5, "source": "x"}),
        "memory.usable_fraction needs a mapping of value (a number",
    ),
    "process without source": (
        _set("processes", "worker", value={"value": "2GiB"}),
        "processes.worker needs a mapping of value and source",
    ),
    "steps the wrong way round": (
        _set("limits", "min_num_batched_tokens", value=4096),
        "limits.min_num_batched_tokens needs a value not above limits.max_num_batched_tokens (2048)",
    ),
    "unknown backend": (
        _set("vllm", "attention_backends", value=[{"name": "TRITON_ATN"}]),
        "vllm.attention_backends needs a list, each entry with a name that is one of CUSTOM, FLASH_ATTN",
    ),
    "text for a number": (_set("limits", "max_num_seqs", value="many"), "limits.max_num_seqs needs a whole number"),
    "flag for a number": (_set("limits", "max_num_seqs", value=True), "limits.max_num_seqs needs a whole number"),
    "number for a flag": (_set("vllm", "enforce_eager", value=1), "vllm.enforce_eager needs true or false"),
    "faster dtype without source": (
        _set("vllm", "attention_backends", value=[{"name": "CUSTOM", "faster_kv_cache_dtype": "fp8"}]),
        "with a faster_kv_cache_dtype that is a mapping of value and source",
    ),
    "unknown faster dtype": (
        _set(
            "vllm",
            "attention_backends",
            value=[{"name": "CUSTOM", "faster_kv_cache_dtype": {"value": "int8", "source": "x"}}],
        ),
        "with a faster_kv_cache_dtype that is a mapping of value (one of auto, fp8",
    ),
    "unknown dtype": (_set("vllm", "dtype", value="int4"), "vllm.dtype needs one of bfloat16, float32, found 'int4'"),
    "unknown device": (_set("device", value="tpu"), "device needs one of cpu, rocm, cuda"),
    "odd block size": (_set("vllm", "block_size", value=100), "vllm.block_size needs a multiple of"),
    "limits crossed": (_set("limits", "min_model_len", value=999999), "limits.min_model_len"),
    "section is a list": (_set("limits", value=[]), "limits needs a mapping"),
    "the file is a list": (lambda document: None, "the file needs a mapping"),
    "one target": (_set("match", "targets", value="gfx1201"), "match.targets needs a list"),
    "no ranks": (_set("limits", "tensor_parallel_sizes", value=[]), "limits.tensor_parallel_sizes needs a list"),
    "rank of zero": (_set("limits", "tensor_parallel_sizes", value=[0]), "limits.tensor_parallel_sizes needs a list"),
    "assumption without source": (
        _set("assumptions", "graphs", value={"value": "512MiB"}),
        "assumptions.graphs needs a mapping of value and source",
    ),
    "assumption without unit": (
        _set("assumptions", "graphs", value={"value": 512, "source": "a guess"}),
        "assumptions.graphs needs a mapping of value",
    ),
    "negative speed": (
        _set("speed", "all_reduce_microseconds", value={"value": -1, "source": "x"}),
        "speed.all_reduce_microseconds",
    ),
    "no bandwidth": (
        _set("speed", "memory_bandwidth_gb_per_second", value={"value": 0, "source": "x"}),
        "speed.memory_bandwidth_gb_per_second needs a mapping of value (a number above 0",
    ),
    "efficiency above all": (
        _set("speed", "bandwidth_efficiency", value={"value": 60, "source": "x"}),
        "speed.bandwidth_efficiency needs a mapping of value (a number above 0 and at most 1",
    ),
    "backend with a typo": (
        _set("vllm", "attention_backends", value=[{"name": "TRITON_ATTN", "max_len": 1}]),
        "vllm.attention_backends needs a list",
    ),
    "variable is a number": (_set("environment", "NCCL_P2P_DISABLE", value=1), "environment needs a mapping"),
    "GPUs without match": (_without("match"), "device rocm needs the key match"),
    "GPUs without assumptions": (_without("assumptions"), "device rocm needs the key assumptions"),
    "GPUs without speed": (_without("speed"), "device rocm needs the key speed"),
    "GPUs without backends": (
        _without("vllm", "attention_backends"),
        "device rocm needs the key vllm.attention_backends",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_profiles_are_refused_by_file_and_key(case: str, configs_dir: Path, tmp_path: Path) -> None:
    change, wanted = BAD[case]
    document = yaml.safe_load((configs_dir / "profiles" / "quad-r9700.yaml").read_text())
    change(document)
    (tmp_path / "profiles").mkdir()
    text = "- a list" if case == "the file is a list" else yaml.safe_dump(document)
    (tmp_path / "profiles" / "mine.yaml").write_text(text)
    with pytest.raises(LauncherError) as caught:
        load_profile(tmp_path, "mine")
    assert caught.value.exit_code == ExitCode.BAD_CONFIGURATION
    assert wanted in caught.value.message and "mine.yaml" in caught.value.message


def test_unreadable_yaml_and_unknown_profile(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.yaml").write_text("a: [")
    (tmp_path / "profiles" / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, text in (("mine", "cannot be read"), ("binary", "cannot be read"), ("other", "no profile 'other'")):
        with pytest.raises(LauncherError, match=text) as caught:
            load_profile(tmp_path, name)
        assert caught.value.exit_code == ExitCode.BAD_CONFIGURATION


def test_where_the_users_own_profiles_are() -> None:
    assert user_profiles_dir({"STEP128_PROFILES_DIR": "/a", "XDG_CONFIG_HOME": "/b"}) == Path("/a")
    assert user_profiles_dir({"XDG_CONFIG_HOME": "/b"}) == Path("/b/step128/profiles")
    assert user_profiles_dir({}) == Path.home() / ".config/step128/profiles"


def test_a_user_folder_adds_and_overrides(configs_dir: Path, tmp_path: Path) -> None:
    text = (configs_dir / "profiles" / "quad-r9700.yaml").read_text()
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.yaml").write_text(text)
    (own / "quad-r9700.yaml").write_text(text.replace("max_num_seqs: 16", "max_num_seqs: 4"))
    files = profile_files(configs_dir, own)
    assert set(files) == {*profile_files(configs_dir), "mine"} and files["quad-r9700"].parent == own
    assert load_profile(configs_dir, "quad-r9700", own).max_num_seqs == 4
    assert load_profile(configs_dir, "mine", own).max_num_seqs == 16
