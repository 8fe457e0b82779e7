"""The doctor's checks of settings, versions and caches of compiled kernels."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.doctor import Finding, attention, caches, versions
from step128_launcher.doctor.context import Context
from step128_launcher.hardware import probe
from step128_launcher.planning.profile_schema import AttentionBackend
from step128_launcher.planning.profiles import load_profile

QUAD = "quad-r9700"
STRIX = "strix-halo-128-gtt120"
LXC = "strix-halo-lxc"
NONE = "no-gpu"
SPARK = "dgx-spark"

machine = dict  # changes of the machine

CASES: list[tuple[Callable[[Context], Finding], str, Any, dict[str, str], str, str]] = [
    (attention.check_backend, QUAD, None, {}, "SKIP", "no profile"),
    (attention.check_backend, QUAD, None, {"VLLM_ATTENTION_BACKEND": "TRITON_ATTN"}, "WARN", "ignores it"),
    (attention.check_aiter, QUAD, None, {}, "PASS", "off"),
    (attention.check_aiter, STRIX, None, {"VLLM_ROCM_USE_AITER": "1"}, "FAIL", "gfx1151"),
    (attention.check_aiter, NONE, None, {"VLLM_ROCM_USE_AITER": "1"}, "SKIP", "no usable"),
    (attention.check_override, QUAD, None, {}, "PASS", "not set"),
    (attention.check_override, QUAD, None, {"HSA_OVERRIDE_GFX_VERSION": "11.0.0"}, "FAIL", "gfx1201"),
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
    (caches.check_caches, QUAD, None, {}, "SKIP", "recorded"),
    (caches.check_stale_caches, QUAD, None, {}, "SKIP", "recorded"),
    (versions.check_virtual_machine, SPARK, None, {}, "SKIP", "NVIDIA GB10 shares"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__[6:]}-{case[1]}-{case[4]}")
def test_findings(case: Any, expect: Callable[[Any], None]) -> None:
    expect(case)


def test_what_the_profile_names(look: Callable[..., Finding], configs_dir: Path) -> None:
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


@pytest.mark.parametrize(("version", "outcome"), [("20251111-0ubuntu1", "PASS"), ("20251125git-1", "FAIL")])
def test_linux_firmware(look: Callable[..., Finding], tree: Callable[[str], Path], version: str, outcome: str) -> None:
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
def test_image_without_the_gpus_target(
    look: Callable[..., Finding], tree: Callable[[str], Path], target: str | None, outcome: str
) -> None:
    root = tree(QUAD)
    if target is not None:
        (root / "opt/rocm/lib/rocblas/library").mkdir(parents=True)
        (root / f"opt/rocm/lib/rocblas/library/TensileLibrary_lazy_{target}.dat").touch()
    found = look(versions.check_image_target, root)
    assert found.outcome == outcome and (target is None or "gfx1201" in found.evidence)


@pytest.mark.parametrize(("flags", "outcome"), [("fpu sse hypervisor", "WARN"), ("fpu sse", "PASS")])
def test_virtual_machine(look: Callable[..., Finding], tree: Callable[[str], Path], flags: str, outcome: str) -> None:
    root = tree(QUAD)
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert look(versions.check_virtual_machine, root).outcome == outcome


def test_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = replace(probe(Path(__file__).parents[2] / "machines" / QUAD, {}), container=None)
    folders = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}

    def check(container: str | None = None) -> Finding:
        return caches.check_caches(Context(replace(hardware, container=container), folders, None, Path("/"), tmp_path))

    assert check().outcome == "WARN" and "15 to 30 minutes" in check().remedy
    for folder in folders.values():
        Path(folder).mkdir()
        (Path(folder) / "kernel").touch()
    assert check().outcome == "PASS"
    monkeypatch.setattr(caches, "_on_a_mount", lambda folder: False)
    assert check("docker").outcome == "WARN" and "volume" in check("docker").remedy
    monkeypatch.setattr(caches, "_on_a_mount", lambda folder: True)
    assert check("docker").outcome == "PASS"
    shutil.rmtree(folders["TRITON_CACHE_DIR"])
    (tmp_path / "triton").write_text("a file in the folder's place")
    assert check().outcome == "FAIL" and folders["TRITON_CACHE_DIR"] in check().evidence


KERNEL = '{"hash": "1", "triton_version": "%s"}'


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """A machine with vLLM 1.2 installed at 1000 s and Triton 3.9.0 for ROCm, and its cache folders."""
    site = tmp_path / "site"
    for name, version in (("vllm", "1.2"), ("triton", "3.9.0+rocm7.1")):
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "RECORD").write_text(f"{folder.name}/RECORD,,\n")
        os.utime(folder / "RECORD", (1000, 1000))
    packages = {found.metadata["Name"]: found for found in distributions(path=[str(site)])}
    monkeypatch.setattr(caches, "installed", lambda names: next((packages[n] for n in names if n in packages), None))
    folders = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    hardware = probe(Path(__file__).parents[2] / "machines" / QUAD, {})
    return Context(hardware, folders, None, Path("/"), tmp_path)


@pytest.mark.parametrize(
    "where", ["triton/KEY/kernel.json", "vllm/torch_compile_cache/0a/triton_cache/KEY/kernel.json"]
)
def test_kernels_of_another_triton(cached: Context, tmp_path: Path, where: str) -> None:
    assert caches.check_stale_caches(cached).outcome == "PASS"
    kernel = tmp_path / where
    kernel.parent.mkdir(parents=True)
    for text, outcome in ((KERNEL % "3.9.0", "PASS"), ("{", "PASS"), ("[]", "PASS"), (KERNEL % "3.4.0", "WARN")):
        kernel.write_text(text)
        found = caches.check_stale_caches(cached)
        assert found.outcome == outcome, (text, found)
    assert "Triton 3.4.0, installed is 3.9.0" in found.evidence and str(kernel.parents[1]) in found.remedy
    (kernel.parents[1] / "OTHER").mkdir()
    (kernel.parents[1] / "OTHER/kernel.json").write_text(KERNEL % "3.9.0+rocm7.1")
    assert caches.check_stale_caches(cached).outcome == "PASS"


def test_graphs_older_than_vllm(cached: Context, tmp_path: Path) -> None:
    compiled = tmp_path / "vllm/torch_compile_cache"
    (compiled / "0a").mkdir(parents=True)
    (compiled / "torch_aot_compile/0b").mkdir(parents=True)
    for folder in (compiled / "0a", compiled / "torch_aot_compile/0b"):
        os.utime(folder, (500, 500))
    found = caches.check_stale_caches(cached)
    assert found.outcome == "WARN" and "older than the installation of vLLM 1.2 (1970-01-01)" in found.evidence
    os.utime(compiled / "torch_aot_compile/0b", (1500, 1500))
    assert caches.check_stale_caches(cached).outcome == "PASS"


def test_packages_are_found_without_an_import() -> None:
    found = caches.installed(("no-such-package", "pytest"))
    assert found is not None and found.version == pytest.__version__
    assert caches.installed(("no-such-package",)) is None
