"""Every check of the doctor: a machine or environment on which it passes, and one on which it does not."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from step128_launcher.doctor import (
    CHECKS,
    Finding,
    any_failed,
    attention,
    containers,
    findings_document,
    memory,
    power,
    print_findings,
    rccl,
    run_doctor,
    versions,
    visibility,
)
from step128_launcher.doctor.context import Context
from step128_launcher.hardware import probe
from step128_launcher.machine.types import Gpu, Hardware, PcieLink, TtmLimit
from step128_launcher.planning.profile_schema import AttentionBackend
from step128_launcher.planning.profiles import Profile, load_profile

MACHINES = Path(__file__).parents[1] / "machines"
GIB = 2**30
QUAD, STRIX, BOTH, SINGLE = "quad-r9700", "strix-halo-128-gtt120", "r9700-plus-igpu", "single-r9700"
DEFAULT, CARVED, LXC, NONE = "strix-halo-128-default", "strix-halo-128-carveout96", "strix-halo-lxc", "no-gpu"
Change = Callable[[Hardware], Hardware]


def look(
    check: Callable[[Context], Finding],
    tree: str | Path,
    change: Change | None = None,
    environment: Mapping[str, str] | None = None,
    profile: Profile | None = None,
) -> Finding:
    root = MACHINES / tree
    hardware = probe(root, environment or {})
    hardware = change(hardware) if change else hardware
    return check(Context(hardware, environment or {}, profile, root, root / "no-configs"))


def machine(**fields: Any) -> Change:
    return lambda hardware: replace(hardware, **fields)


def gpu(number: int | None, **fields: Any) -> Change:
    """Change one GPU, or all."""

    def change(hardware: Hardware) -> Hardware:
        def one(index: int, found: Gpu) -> Gpu:
            return replace(found, **fields) if number in (None, index) else found

        return replace(hardware, gpus=tuple(one(index, found) for index, found in enumerate(hardware.gpus)))

    return change


def first(count: int) -> Change:
    return lambda hardware: replace(hardware, gpus=hardware.gpus[:count])


SAFE = {"NCCL_PROTO": "Simple", "NCCL_P2P_DISABLE": "1"}
HIDDEN = {"HIP_VISIBLE_DEVICES": "-1"}
CASES: list[tuple[Callable[[Context], Finding], str, Change | None, dict[str, str], str, str]] = [
    # check, tree, change, environment, outcome, a word of its evidence or remedy
    (visibility.check_unreadable, QUAD, None, {}, "PASS", "could be read"),
    (visibility.check_unreadable, QUAD, machine(unreadable=("/sys/x: EPERM",) * 6), {}, "WARN", "and 2 more"),
    (visibility.check_gpus, QUAD, None, {}, "PASS", "0000:63:00.0 AMD Radeon AI PRO R9700 (gfx1201)"),
    (visibility.check_gpus, QUAD, None, HIDDEN, "FAIL", "HIP_VISIBLE_DEVICES=-1"),
    (visibility.check_gpus, "gpu-node", None, {}, "FAIL", "dmesg"),
    (visibility.check_gpus, NONE, None, {}, "SKIP", "CPU"),
    (visibility.check_variables, QUAD, None, {}, "PASS", "none of"),
    (visibility.check_variables, QUAD, None, {"HIP_VISIBLE_DEVICES": "0,1"}, "PASS", "2 GPUs"),
    (
        visibility.check_variables,
        QUAD,
        None,
        {"HIP_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "2,3"},
        "FAIL",
        "HIP_VISIBLE_DEVICES only",
    ),
    (
        visibility.check_variables,
        QUAD,
        None,
        {"HIP_VISIBLE_DEVICES": "2,3", "ROCR_VISIBLE_DEVICES": "2,3"},
        "FAIL",
        "0 of the 2",
    ),
    (
        visibility.check_variables,
        QUAD,
        None,
        {"HIP_VISIBLE_DEVICES": "0,1", "ROCR_VISIBLE_DEVICES": "2,3"},
        "WARN",
        "2 of the 2",
    ),
    (visibility.check_variables, QUAD, None, {"HIP_VISIBLE_DEVICES": "0000:03:00.0"}, "WARN", "neither an index"),
    (visibility.check_variables, "dgx-spark", None, {"CUDA_VISIBLE_DEVICES": "0"}, "SKIP", "no AMD GPU"),
    (visibility.check_integrated, QUAD, None, {}, "PASS", "no mix"),
    (visibility.check_integrated, BOTH, None, {}, "PASS", "sets HIP_VISIBLE_DEVICES=0,"),
    (visibility.check_integrated, BOTH, None, {"HIP_VISIBLE_DEVICES": "0,1"}, "FAIL", "export HIP_VISIBLE_DEVICES=0 "),
    (visibility.check_integrated, BOTH, None, {"HIP_VISIBLE_DEVICES": "0"}, "PASS", "no mix"),
    (visibility.check_integrated, NONE, None, {}, "SKIP", "no usable"),
    (visibility.check_order, QUAD, None, {}, "PASS", "3 = 0000:63:00.0"),
    (visibility.check_order, QUAD, gpu(3, kfd_node=0), {}, "WARN", "0 = 0000:63:00.0"),
    (visibility.check_order, SINGLE, None, {}, "SKIP", "fewer than two"),
    (visibility.check_rank_count, QUAD, None, {}, "PASS", "cards: 4"),
    (visibility.check_rank_count, QUAD, first(3), {}, "WARN", "only 2 can be used"),
    (visibility.check_rank_count, STRIX, None, {}, "SKIP", "no usable card"),
    (rccl.check_protocol, QUAD, None, SAFE, "PASS", "the environment"),
    (rccl.check_protocol, QUAD, None, {}, "FAIL", "1.0.70201"),
    (rccl.check_protocol, QUAD, None, {"NCCL_PROTO": "LL,Simple"}, "FAIL", "export NCCL_PROTO=Simple"),
    (rccl.check_protocol, SINGLE, None, {}, "SKIP", "fewer than two"),
    (rccl.check_protocol, "quad-48gb", None, {}, "SKIP", "no gfx12"),
    (rccl.check_peer_to_peer, QUAD, None, SAFE, "PASS", "host memory"),
    (rccl.check_peer_to_peer, QUAD, None, {}, "FAIL", "reset the host"),
    (rccl.check_peer_to_peer, QUAD, None, {"NCCL_P2P_DISABLE": "0"}, "WARN", "lspci"),
    (rccl.check_peer_to_peer, STRIX, None, {}, "SKIP", "fewer than two"),
    (rccl.check_resizable_bar, QUAD, None, {}, "PASS", "cards: 4"),
    (
        rccl.check_resizable_bar,
        QUAD,
        gpu(1, visible_vram_bytes=256 << 20),
        {},
        "WARN",
        "256 MiB of the memory of 0000:23",
    ),
    (rccl.check_resizable_bar, QUAD, gpu(1, visible_vram_bytes=None), {}, "SKIP", "does not tell"),
    (rccl.check_links, QUAD, None, {}, "PASS", "x16 of x16"),
    (rccl.check_links, QUAD, gpu(2, link=PcieLink(16.0, 4, 16.0, 16)), {}, "WARN", "Reseat"),
    (rccl.check_links, QUAD, gpu(2, link=PcieLink(16.0, 8, 16.0, 8)), {}, "WARN", "uneven"),
    (rccl.check_links, QUAD, gpu(None, link=PcieLink(16.0, 4, 16.0, 4)), {}, "WARN", "narrow"),
    (rccl.check_links, SINGLE, None, {}, "PASS", "x8 of x8"),
    (rccl.check_links, QUAD, gpu(2, link=None), {}, "SKIP", "cannot be read"),
    (rccl.check_numa, QUAD, None, {}, "PASS", "node 0"),
    (rccl.check_numa, QUAD, gpu(3, numa_node=1), {}, "WARN", "0000:63:00.0 on node 1"),
    (rccl.check_numa, QUAD, gpu(3, numa_node=None), {}, "SKIP", "does not tell"),
    (rccl.check_iommu, QUAD, None, {}, "PASS", "identity"),
    (rccl.check_iommu, QUAD, gpu(1, iommu_domain="DMA-FQ"), {}, "WARN", "iommu=pt"),
    (rccl.check_iommu, QUAD, gpu(None, iommu_domain=None), {}, "PASS", "command line"),
    (rccl.check_iommu, STRIX, None, {}, "PASS", "amd_iommu=off"),
    (rccl.check_iommu, SINGLE, None, {}, "SKIP", "fewer than two"),
    (attention.check_backend, QUAD, None, {}, "SKIP", "no profile"),
    (attention.check_backend, QUAD, None, {"VLLM_ATTENTION_BACKEND": "TRITON_ATTN"}, "WARN", "ignores it"),
    (attention.check_aiter, QUAD, None, {}, "PASS", "off"),
    (attention.check_aiter, STRIX, None, {"VLLM_ROCM_USE_AITER": "1"}, "FAIL", "gfx1151"),
    (attention.check_aiter, NONE, None, {"VLLM_ROCM_USE_AITER": "1"}, "SKIP", "no usable"),
    (attention.check_override, QUAD, None, {}, "PASS", "not set"),
    (attention.check_override, QUAD, None, {"HSA_OVERRIDE_GFX_VERSION": "11.0.0"}, "FAIL", "gfx1201"),
    (memory.check_carve_out, STRIX, None, {}, "PASS", "512.0 MiB"),
    (memory.check_carve_out, CARVED, None, {}, "WARN", "amd-ttm --set 120"),
    (memory.check_carve_out, BOTH, None, {}, "SKIP", "memory of its own"),
    (memory.check_gtt, STRIX, None, {}, "PASS", "120.00 GiB"),
    (memory.check_gtt, DEFAULT, None, {}, "WARN", "options ttm pages_limit=31457280"),
    (memory.check_gtt, CARVED, None, {}, "SKIP", "not used"),
    (memory.check_gtt, STRIX, gpu(0, gtt_total_bytes=200 * GIB), {}, "WARN", "more than there is"),
    (memory.check_ttm, STRIX, None, {}, "PASS", "ttm 120.00 GiB"),
    (memory.check_ttm, STRIX, machine(ttm_limits=(TtmLimit("ttm", 60 * GIB),)), {}, "WARN", "fail at the limit"),
    (
        memory.check_ttm,
        STRIX,
        machine(ttm_limits=(TtmLimit("ttm", 62 * GIB), TtmLimit("amdttm", 120 * GIB))),
        {},
        "WARN",
        "options amdttm pages_limit=",
    ),
    (
        memory.check_ttm,
        STRIX,
        machine(kernel_command_line="quiet amdgpu.gttsize=131072 ttm.pages_limit=31457280"),
        {},
        "WARN",
        "Remove amdgpu.gttsize",
    ),
    (memory.check_ttm, STRIX, machine(ttm_limits=()), {}, "SKIP", "no TTM module"),
    (memory.check_container_limit, STRIX, None, {}, "PASS", "no memory limit"),
    (memory.check_container_limit, LXC, None, {}, "WARN", "64.00 GiB"),
    (memory.check_container_limit, "container-6gib", None, {}, "PASS", "keeps to it"),
    (memory.check_swap, STRIX, None, {}, "PASS", "0 B"),
    (memory.check_swap, STRIX, machine(swap_free_bytes=3 * GIB), {}, "WARN", "swapoff"),
    (memory.check_swap, QUAD, None, {}, "SKIP", "memory of its own"),
    (memory.check_model_fits, QUAD, None, {}, "SKIP", "no checkpoint"),
    (versions.check_kernel, STRIX, None, {}, "PASS", "6.18.7"),
    (versions.check_kernel, STRIX, machine(kernel_release="6.17.0-19-generic"), {}, "PASS", "6.17.0-19"),
    (versions.check_kernel, STRIX, machine(kernel_release="6.14.0-1018-oem"), {}, "PASS", "6.14.0-1018"),
    (versions.check_kernel, STRIX, machine(kernel_release="6.17.0-18-generic"), {}, "WARN", "6.18.4"),
    (versions.check_kernel, STRIX, machine(kernel_release="6.18.3"), {}, "WARN", "6.18.4"),
    (versions.check_kernel, STRIX, machine(kernel_release=None), {}, "SKIP", "cannot be read"),
    (versions.check_kernel, QUAD, None, {}, "SKIP", "no minimum"),
    (versions.check_firmware, STRIX, None, {}, "SKIP", "mes 0x00000083"),
    (versions.check_firmware, LXC, None, {}, "SKIP", "the host's"),
    (versions.check_virtual_machine, QUAD, None, {}, "SKIP", "cannot be read"),
    (power.check_power_caps, QUAD, None, {}, "PASS", "together 1200 W"),
    (power.check_power_caps, QUAD, gpu(2, power_cap_watts=210.0), {}, "WARN", "0000:43:00.0 210 W"),
    (power.check_power_caps, QUAD, gpu(2, power_cap_watts=None), {}, "SKIP", "cannot be read"),
    (power.check_equal_memory, QUAD, None, {}, "PASS", "4 cards of 31.86 GiB"),
    (power.check_equal_memory, QUAD, gpu(0, vram_total_bytes=30 * GIB), {}, "WARN", "ECC"),
    (power.check_equal_memory, QUAD, gpu(0, vram_used_bytes=2 * GIB), {}, "WARN", "in use before"),
    (power.check_equal_memory, QUAD, gpu(0, vram_total_bytes=None), {}, "SKIP", "cannot be read"),
    (power.check_temperatures, STRIX, None, {}, "SKIP", "no usable card"),
    (power.check_temperatures, QUAD, None, {}, "PASS", "edge alike"),
    (containers.check_devices, QUAD, None, {}, "PASS", "/dev/kfd"),
    (containers.check_devices, NONE, None, {}, "SKIP", "no GPU"),
    (containers.check_devices, "dgx-spark", None, {}, "PASS", "/dev/nvidiactl"),
    (containers.check_devices, QUAD, machine(device_nodes=()), {}, "FAIL", "modprobe amdgpu"),
    (containers.check_devices, QUAD, machine(device_nodes=(), container="docker"), {}, "FAIL", "--device /dev/kfd"),
    (containers.check_devices, LXC, machine(device_nodes=()), {}, "FAIL", "lxc.mount.entry"),
    (containers.check_shared_memory, QUAD, None, {}, "PASS", "62.82 GiB"),
    (containers.check_shared_memory, QUAD, machine(shm_bytes=64 << 20), {}, "FAIL", "--shm-size 16g"),
    (containers.check_shared_memory, QUAD, machine(shm_bytes=4 * GIB), {}, "WARN", "4.00 GiB"),
    (containers.check_shared_memory, QUAD, machine(shm_bytes=None), {}, "SKIP", "cannot be read"),
    (containers.check_shared_memory, STRIX, machine(shm_bytes=64 << 20), {}, "SKIP", "one GPU"),
    (containers.check_leftovers, QUAD, None, {}, "SKIP", "cannot be listed"),
    (containers.check_caches, QUAD, None, {}, "SKIP", "recorded"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__[6:]}-{case[1]}-{case[4]}")
def test_findings(case: tuple[Callable[[Context], Finding], str, Change | None, dict[str, str], str, str]) -> None:
    check, tree, change, environment, outcome, word = case
    found = look(check, tree, change, environment)
    assert found.outcome == outcome, found
    assert word in found.evidence + found.remedy, found
    assert bool(found.remedy) == (outcome in ("WARN", "FAIL")), found


@pytest.mark.parametrize(
    ("container", "remedy"),
    [(None, "usermod -aG render,video"), ("docker", "--group-add 992"), ("podman", "keep-groups")],
)
def test_device_nodes_that_may_not_be_opened(container: str | None, remedy: str) -> None:
    def deny(hardware: Hardware) -> Hardware:
        nodes = tuple(replace(node, accessible=False, group_id=992) for node in hardware.device_nodes)
        return replace(hardware, device_nodes=nodes, container=container)

    found = look(containers.check_devices, QUAD, deny)
    assert found.outcome == "FAIL" and "/dev/kfd (group 992)" in found.evidence and remedy in found.remedy
    assert "44, 992, 1000" in found.evidence


def test_profiles_settings_count_unless_the_user_sets_them(configs_dir: Path) -> None:
    profile = load_profile(configs_dir, "quad-r9700")
    profile = replace(profile, environment=tuple(SAFE.items()))
    for check in (rccl.check_protocol, rccl.check_peer_to_peer):
        found = look(check, QUAD, profile=profile)
        assert found.outcome == "PASS" and "profile quad-r9700" in found.evidence
        assert look(check, QUAD, None, {"NCCL_PROTO": "LL", "NCCL_P2P_DISABLE": "0"}, profile).outcome != "PASS"


def test_what_the_profile_names(configs_dir: Path) -> None:
    profile = load_profile(configs_dir, "quad-r9700")
    slow = replace(profile, attention_backends=(AttentionBackend("ROCM_ATTN", None, (), "why"),))
    good = replace(profile, attention_backends=(AttentionBackend("TRITON_ATTN", None, (), "why"),))
    assert look(attention.check_backend, QUAD, profile=good).outcome == "PASS"
    assert look(attention.check_backend, QUAD, profile=slow).outcome == "FAIL"
    for arguments, outcome in (
        (("--mm-encoder-attn-backend", "TRITON_ATTN"), "PASS"),
        (("--mm-encoder-attn-backend=TRITON_ATTN",), "PASS"),
        (("--mm-encoder-attn-backend", "TORCH_SDPA"), "WARN"),
        ((), "WARN"),
    ):
        found = look(attention.check_vision_backend, QUAD, profile=replace(profile, arguments=arguments))
        assert found.outcome == outcome
    for share, outcome in ((0.92, "PASS"), (0.97, "WARN")):
        found = look(attention.check_utilization, QUAD, profile=replace(profile, usable_fraction=share))
        assert found.outcome == outcome


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        shutil.copytree(MACHINES / name, tmp_path / name, symlinks=True)
        return tmp_path / name

    return copy


@pytest.mark.parametrize(("version", "outcome"), [("20251111-0ubuntu1", "PASS"), ("20251125git-1", "FAIL")])
def test_linux_firmware(tree: Callable[[str], Path], version: str, outcome: str) -> None:
    root = tree(STRIX)
    (root / "var/lib/dpkg").mkdir(parents=True)
    package = (
        "Package: linux-firmware\nStatus: install ok installed\nVersion: {}\n\nPackage: other\nVersion: 20251125\n"
    )
    (root / "var/lib/dpkg/status").write_text("Package: a\nVersion: 20251125\n\n" + package.format(version))
    assert look(versions.check_firmware, root).outcome == outcome


@pytest.mark.parametrize(
    ("target", "outcome"), [("gfx1201", "PASS"), ("gfx1100", "FAIL"), ("gfx12010", "FAIL"), (None, "SKIP")]
)
def test_image_without_the_gpus_target(tree: Callable[[str], Path], target: str | None, outcome: str) -> None:
    root = tree(QUAD)
    if target is not None:
        (root / "opt/rocm/lib/rocblas/library").mkdir(parents=True)
        (root / f"opt/rocm/lib/rocblas/library/TensileLibrary_lazy_{target}.dat").touch()
    found = look(versions.check_image_target, root)
    assert found.outcome == outcome and (target is None or "gfx1201" in found.evidence)


@pytest.mark.parametrize(("flags", "outcome"), [("fpu sse hypervisor", "WARN"), ("fpu sse", "PASS")])
def test_virtual_machine(tree: Callable[[str], Path], flags: str, outcome: str) -> None:
    root = tree(QUAD)
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert look(versions.check_virtual_machine, root).outcome == outcome


@pytest.mark.parametrize(("millidegrees", "outcome"), [("62000", "WARN"), ("99000", "FAIL"), ("?", "PASS")])
def test_a_card_hotter_than_the_others(tree: Callable[[str], Path], millidegrees: str, outcome: str) -> None:
    root = tree(QUAD)
    (sensor,) = (root / "sys/class/drm/card3/device/hwmon").glob("hwmon*/temp1_input")
    sensor.write_text(millidegrees)
    found = look(power.check_temperatures, root)
    assert found.outcome == outcome and "0000:63:00.0" in found.evidence


def test_leftover_segments(tree: Callable[[str], Path]) -> None:
    root = tree(QUAD)
    (root / "dev/shm").mkdir()
    assert look(containers.check_leftovers, root).outcome == "PASS"
    for name in ("nccl-abc", "psm_1", "someone-elses"):
        with (root / "dev/shm" / name).open("wb") as file:
            file.truncate(100 << 20)  # a hole: takes no space
    found = look(containers.check_leftovers, root)
    assert found.outcome == "WARN" and "2 segments" in found.evidence and "200.0 MiB" in found.evidence


def test_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = replace(probe(MACHINES / QUAD, {}), container=None)
    folders = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}

    def check(container: str | None = None) -> Finding:
        return containers.check_caches(
            Context(replace(hardware, container=container), folders, None, Path("/"), tmp_path)
        )

    assert check().outcome == "WARN" and "15 to 30 minutes" in check().remedy
    for folder in folders.values():
        Path(folder).mkdir()
        (Path(folder) / "kernel").touch()
    assert check().outcome == "PASS"
    monkeypatch.setattr(containers, "_on_a_mount", lambda folder: False)
    assert check("docker").outcome == "WARN" and "volume" in check("docker").remedy
    monkeypatch.setattr(containers, "_on_a_mount", lambda folder: True)
    assert check("docker").outcome == "PASS"
    shutil.rmtree(folders["TRITON_CACHE_DIR"])
    (tmp_path / "triton").write_text("a file in the folder's place")
    assert check().outcome == "FAIL" and folders["TRITON_CACHE_DIR"] in check().evidence


def doctor(tree: str, configs_dir: Path, **options: Any) -> list[Finding]:
    root = MACHINES / tree
    arguments: dict[str, Any] = {"configs_dir": configs_dir, "model": None, "all_reduce": False, "root": root}
    environment = options.pop("environment", {})
    return run_doctor(probe(root, environment), options.pop("profile", None), environment, **(arguments | options))


@pytest.mark.parametrize("tree", sorted(path.name for path in MACHINES.iterdir() if (path / "ORIGIN").exists()))
def test_every_machine_gets_every_check_once(tree: str, configs_dir: Path) -> None:
    found = doctor(tree, configs_dir)
    assert len(found) == len(CHECKS) + 2 and len({one.check for one in found}) == len(found)
    assert all(one.evidence for one in found)


def test_broken_checkpoint_and_profile_are_findings(configs_dir: Path, tmp_path: Path) -> None:
    found = {one.check: one for one in doctor(QUAD, configs_dir, profile="none", model=tmp_path, all_reduce=True)}
    assert found["profile"].outcome == "FAIL" and "none" in found["profile"].evidence
    assert found["checkpoint"].outcome == "FAIL" and str(tmp_path) in found["checkpoint"].evidence
    assert found["chat-template"].outcome == "FAIL"
    assert found["all-reduce"].outcome == "SKIP" and "recorded" in found["all-reduce"].evidence


def test_report(configs_dir: Path) -> None:
    found = doctor(DEFAULT, configs_dir)
    document = findings_document(found)
    assert document["schema"] == 1 and len(document["findings"]) == len(found)
    assert document["warned"] == sum(one.outcome == "WARN" for one in found) > 0
    assert json.loads(json.dumps(document)) == document
    assert any_failed(found) == bool(document["failed"])
    assert any_failed([Finding("x", "FAIL", "[y]")]) and not any_failed([Finding("x", "WARN", "y")])
    console = Console(width=100, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        print_findings(console, [*found, Finding("marked", "FAIL", "[red]x[/red]", "do [this]")])
    text = captured.get()
    assert "[red]x[/red]" in text and "→ do [this]" in text
    assert "amd-ttm --set 120" in text and text.strip().splitlines()[-1].startswith("RESULT")
