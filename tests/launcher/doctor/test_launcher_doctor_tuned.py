"""The doctor's check of tuned configurations: under which name, in which folder, and from where their figures are.

The checkpoint has 4 experts of 32 columns, so that one of four ranks has N=8.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from step128_launcher.doctor.context import Context
from step128_launcher.doctor.finding import Finding
from step128_launcher.doctor.tuned_files import check_tuned_config
from step128_launcher.hardware import probe
from step128_launcher.model.checkpoint import read_footprint
from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.model.quantization import Format

MACHINES = Path(__file__).parents[2] / "machines"
MEASURED, MODELLED = "measured", "modelled, not measured"
NL4 = "E=4,N=8,device_name=AMD_Radeon_R9700,dtype=nl4.json"
PLAIN = "E=4,N=8,device_name=AMD_Radeon_R9700.json"
Check = Callable[..., Finding]


def write(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))


@pytest.fixture
def plain(make_checkpoint: Callable[..., Path], nl4_format: Format) -> ModelFootprint:
    return read_footprint(make_checkpoint(quantized=False), nl4_format)


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Check a checkpoint with the folders `configs` and, as the user's own, `own`, on this machine as a tree tells."""

    def run(footprint: ModelFootprint | None, tree: str = "quad-r9700", **environment: str) -> Finding:
        hardware = probe(MACHINES / tree, {})
        return check_tuned_config(
            Context(hardware, environment, None, Path("/"), tmp_path / "configs", footprint=footprint)
        )

    return run


@pytest.mark.parametrize("source", [MEASURED, MODELLED])
def test_nl4_by_its_exact_name(check: Check, footprint: ModelFootprint, tmp_path: Path, source: str) -> None:
    tuned = tmp_path / "configs/tuned"
    for name in (PLAIN, "E=4,N=8,device_name=AMD_Radeon_R9700,dtype=fp8_w8a8.json", NL4.replace("N=8", "N=16")):
        write(tuned / name, {"source": MEASURED})
    write(tuned / "vllm" / NL4, {"source": MEASURED})
    command = "step128-kernels tune --kernel nl4_moe --shape E=4,N=8,K=64,top_k=2"
    found = check(footprint)
    assert found.outcome == "WARN" and NL4 in found.evidence and command in found.remedy
    write(tuned / NL4, {"source": source})
    found = check(footprint)
    assert (found.outcome, found.evidence) == ("PASS", f"{NL4}, {source}")
    assert (command in found.remedy) == (source == MODELLED)


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ("quad-r9700", NL4.replace("Radeon_R9700", "Radeon_AI_PRO_R9700")),
        ("strix-halo-128-gtt120", "E=4,N=32,device_name=AMD_Radeon_8060S,dtype=nl4.json"),
        ("strix-halo-128-gtt120", "E=4,N=32,device_name=Radeon_8060S_Graphics,dtype=nl4.json"),
    ],
)
def test_both_names_of_a_gpu(check: Check, footprint: ModelFootprint, tmp_path: Path, tree: str, name: str) -> None:
    write(tmp_path / "configs/tuned" / name, {"source": MEASURED})
    assert check(footprint, tree).evidence == f"{name}, {MEASURED}"


def test_own_nl4_files_go_before_ours(check: Check, footprint: ModelFootprint, tmp_path: Path) -> None:
    own = tmp_path / "own"
    write(tmp_path / "configs/tuned" / NL4, {"source": MODELLED})
    found = check(footprint, STEP128_TUNED_DIR=str(own))
    assert found.outcome == "FAIL" and str(own) in found.evidence  # the kernels end with an error
    own.mkdir()
    assert MODELLED in check(footprint, STEP128_TUNED_DIR=str(own)).evidence
    write(own / NL4, {"source": MEASURED})
    assert check(footprint, STEP128_TUNED_DIR=str(own)).evidence == f"{NL4}, {MEASURED}"


@pytest.mark.parametrize("spoilt", ["{", "[]", "{}", '{"source": "guessed"}', "[" * 100_000])
def test_an_unreadable_file_is_named(check: Check, footprint: ModelFootprint, tmp_path: Path, spoilt: str) -> None:
    write(tmp_path / "configs/tuned" / NL4, spoilt)
    found = check(footprint)
    assert found.outcome == "WARN" and NL4 in found.evidence and "tune --kernel nl4_moe" in found.remedy


def test_a_link_to_nothing_is_named(check: Check, footprint: ModelFootprint, tmp_path: Path) -> None:
    (tmp_path / "configs/tuned").mkdir(parents=True)
    (tmp_path / "configs/tuned" / NL4).symlink_to("nowhere")
    found = check(footprint)
    assert found.outcome == "WARN" and NL4 in found.evidence


def test_vllms_file_and_its_origin(check: Check, plain: ModelFootprint, tmp_path: Path) -> None:
    folder = tmp_path / "configs/tuned/vllm"
    origin = folder / PLAIN.replace(".json", ".provenance.json")
    write(tmp_path / "configs/tuned" / NL4, {"source": MEASURED})
    write(origin, {"source": MODELLED})
    found = check(plain)
    command = "step128-kernels tune --kernel vllm_fused_moe --shape E=4,N=8,K=64,top_k=2"
    assert found.outcome == "WARN" and PLAIN in found.evidence and command in found.remedy
    write(folder / PLAIN, {"1": {}})
    found = check(plain)
    assert (found.outcome, found.evidence) == ("PASS", f"{PLAIN}, {MODELLED}") and command in found.remedy
    write(origin, {"source": MEASURED})
    found = check(plain)
    assert (found.outcome, found.evidence, found.remedy) == ("PASS", f"{PLAIN}, {MEASURED}", "")
    origin.unlink()
    found = check(plain)
    assert found.outcome == "PASS" and "nothing beside it" in found.evidence
    write(origin, "{")
    assert check(plain).outcome == "WARN" and origin.name in check(plain).evidence
    write(folder / PLAIN, "{")
    assert check(plain).outcome == "WARN" and PLAIN in check(plain).evidence


def test_the_folder_that_vllm_gets_is_the_one_looked_in(check: Check, plain: ModelFootprint, tmp_path: Path) -> None:
    """VLLM_TUNED_CONFIG_FOLDER, else the user's own, else ours: vLLM reads one folder only."""
    own, named = tmp_path / "own", tmp_path / "named"
    (own / "vllm").mkdir(parents=True)
    write(tmp_path / "configs/tuned/vllm" / PLAIN, {})
    assert check(plain).outcome == "PASS"
    assert check(plain, STEP128_TUNED_DIR=str(named)).outcome == "PASS"  # there is no named/vllm
    found = check(plain, STEP128_TUNED_DIR=str(own))
    assert found.outcome == "WARN" and str(own / "vllm") in found.evidence
    write(own / "vllm" / PLAIN, {})
    assert check(plain, STEP128_TUNED_DIR=str(own)).outcome == "PASS"
    both = {"STEP128_TUNED_DIR": str(own), "VLLM_TUNED_CONFIG_FOLDER": str(named)}
    assert check(plain, **both).outcome == "WARN"
    write(named / PLAIN, {})
    assert check(plain, **both).outcome == "PASS"


@pytest.mark.parametrize("ending", [",dtype=fp8_w8a8", ",dtype=fp8_w8a8,block_shape=[128,128]", ""])
def test_experts_of_another_format_have_vllms_names(
    check: Check, footprint: ModelFootprint, tmp_path: Path, ending: str
) -> None:
    assert footprint.quantization is not None
    foreign = replace(footprint, quantization=replace(footprint.quantization, method="fp8"))
    found = check(foreign)
    assert found.outcome == "WARN" and "dtype=…" in found.evidence and "benchmark_moe.py" in found.remedy
    write(tmp_path / "configs/tuned/vllm" / PLAIN.replace(".json", f"{ending}.json"), {})
    assert check(foreign).outcome == "PASS"


def test_nl4_with_experts_that_are_not_quantized(check: Check, footprint: ModelFootprint, tmp_path: Path) -> None:
    assert footprint.quantization is not None
    linears = replace(footprint.quantization, components=footprint.quantization.components - {"routed_experts"})
    write(tmp_path / "configs/tuned/vllm" / PLAIN, {})
    assert PLAIN in check(replace(footprint, quantization=linears)).evidence


@pytest.mark.parametrize(
    ("tree", "word"),
    [("dgx-spark", "NVIDIA"), ("jetson-thor", "NVIDIA"), ("quad-48gb", "gfx1201 and gfx1151 only"), ("no-gpu", "GPU")],
)
def test_where_nothing_is_tuned(check: Check, footprint: ModelFootprint, tree: str, word: str) -> None:
    found = check(footprint, tree)
    assert found.outcome == "SKIP" and word in found.evidence


def test_vllms_kernel_on_another_gpu(check: Check, plain: ModelFootprint) -> None:
    found = check(plain, "quad-48gb")
    assert found.outcome == "WARN" and "AMD_Radeon_PRO_W7900" in found.evidence and "benchmark_moe.py" in found.remedy


def test_no_checkpoint(check: Check) -> None:
    assert check(None).outcome == "SKIP"


def test_a_file_named_after_no_gpu(check: Check, footprint: ModelFootprint, tmp_path: Path) -> None:
    write(tmp_path / "configs/tuned" / NL4, {"source": MEASURED})
    write(tmp_path / "configs/tuned/E=4,N=8,device_name=<MagicMock id='1'>.json", {})
    assert "Mock" in check(footprint).evidence
