"""Profiles: what they may not set, where their figures come from, and machines with other numbers of cards."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from step128_launcher.command import Server, server_argv
from step128_launcher.configs_dir import find_configs_dir
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.model.checkpoint import assume_footprint
from step128_launcher.model.quantization import read_format
from step128_launcher.planning.plan import Limits
from step128_launcher.planning.planner import make_plan
from step128_launcher.planning.profiles import (
    Profile,
    choose_profile,
    load_profile,
    profile_files,
)
from step128_launcher.planning.reserved import ATTENTION_BACKENDS, RESERVED_FLAGS, reserved_flag

MACHINES = Path(__file__).parents[1] / "machines"
REAL_MODEL = Path(__file__).parents[1] / "data" / "step-3.7-flash-240"
Recorded = Callable[[str], Hardware]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def profiles(configs_dir: Path) -> dict[str, Profile]:
    return {name: load_profile(configs_dir, name) for name in profile_files(configs_dir)}


def _set(*path: str, value: Any) -> Change:
    def change(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


FIGURES = (
    *("usable_fraction", "host_usable_fraction", "reserve_bytes", "mm_processor_cache_bytes"),
    *("api_server_bytes", "engine_core_bytes", "worker_bytes"),
)


def test_every_assumed_figure_has_a_source(profiles: dict[str, Profile]) -> None:
    for profile in profiles.values():
        assert all(profile.source(figure) and isinstance(getattr(profile, figure), int | float) for figure in FIGURES)
    quad = profiles["quad-r9700"]
    assert quad.graphs is not None and quad.source("graphs") == quad.graphs.source
    with pytest.raises(KeyError):
        quad.source("max_model_len")


def _owned(configs_dir: Path, tmp_path: Path, change: Change) -> str:
    document = yaml.safe_load((configs_dir / "profiles" / "quad-r9700.yaml").read_text())
    change(document)
    (tmp_path / "profiles").mkdir(exist_ok=True)
    (tmp_path / "profiles" / "mine.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(LauncherError) as caught:
        load_profile(tmp_path, "mine")
    assert caught.value.exit_code == ExitCode.BAD_CONFIGURATION
    return caught.value.message


@pytest.mark.parametrize(
    "argument",
    [
        *(
            "--max-model-len",
            "--max-model-len=5",
            "--max_model_len=5",
            "-tp",
            "--speculative-config.method",
            "--max-mod",
        ),
        *("--no-enforce-eager", "--chat-template=x", "--api-key", "--middleware"),
    ],
)
def test_flags_of_the_launcher_are_refused(argument: str, configs_dir: Path, tmp_path: Path) -> None:
    message = _owned(configs_dir, tmp_path, _set("vllm", "arguments", value=["--disable-cascade-attn", argument]))
    assert "vllm.arguments needs a list, each entry an argument that the launcher does not decide itself" in message


@pytest.mark.parametrize("name", ["VLLM_API_KEY", "VLLM_PLUGINS", "PYTHONSAFEPATH", "STEP128_LOAD_REPORT_DIR"])
def test_variables_of_the_launcher_are_refused(name: str, configs_dir: Path, tmp_path: Path) -> None:
    assert f"environment needs variables that the launcher does not decide itself (it does {name})" in _owned(
        configs_dir, tmp_path, _set("environment", value={name: "1"})
    )


def test_every_flag_the_launcher_gives_is_reserved(recorded: Recorded, profiles: dict[str, Profile]) -> None:
    footprint = assume_footprint(REAL_MODEL, read_format(find_configs_dir({})), "all-linears")
    plan = make_plan(recorded("quad-r9700"), footprint, profiles["quad-r9700"], Limits())
    plan = replace(plan, vision=False, enforce_eager=True, enable_expert_parallel=True)
    where = Path("/nowhere")
    server = Server(where, "m", "127.0.0.1", 8000, where, 60, chat_template=where)
    given = {word for word in server_argv(plan, server) if word.startswith("--")}
    assert given - set(RESERVED_FLAGS) == {word for word in plan.arguments if word.startswith("--")}
    assert "--chat-template" in given and not any(map(reserved_flag, plan.arguments))


def test_backends_are_vllm_s() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert set(ATTENTION_BACKENDS) <= set(AttentionBackendEnum.__members__)


def test_two_three_and_eight_cards(recorded: Recorded, profiles: dict[str, Profile]) -> None:
    footprint = assume_footprint(REAL_MODEL, read_format(find_configs_dir({})), "all-linears")
    hardware = recorded("quad-r9700")
    cards = hardware.gpus

    def having(count: int, vram_gib: int | None = None) -> Hardware:
        found = [replace(cards[i % 4], pci_address=f"0000:{i:02x}:00.0") for i in range(count)]
        if vram_gib is not None:
            found = [replace(card, vram_total_bytes=vram_gib << 30) for card in found]
        return replace(hardware, gpus=tuple(found))

    for count, vram_gib, ranks in ((2, 90, 2), (3, 90, 2), (8, None, 8)):
        box = having(count, vram_gib)
        name = choose_profile(profiles, box)
        assert name == ("quad-r9700" if count == 8 else "single-r9700")
        assert make_plan(box, footprint, profiles[name], Limits()).tensor_parallel_size == ranks
    assert dict(profiles["single-r9700"].environment)["NCCL_PROTO"] == "Simple"
    assert "One R9700" not in profiles["single-r9700"].advice
