"""From command line and machine to what is tuned: never for NVIDIA, and a measurement only for what it ran on."""

import argparse
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from step128_kernels import gpu as tune_device
from step128_kernels.errors import NoSuchKernelError
from step128_kernels.gpu import Gpu, this_gpu
from step128_kernels.tune import command as tune
from step128_kernels.tune import options as tune_options
from step128_kernels.tune import spaces as tune_spaces
from step128_kernels.tune.options import UnsupportedGpuError, UsageError, output_folder, plan
from step128_kernels.tuned.names import file_name, spellings, tune_command

SHAPES = {
    "nl4_gemm": ({"N": 2560, "K": 4096}, {"N": 4096, "K": 1280}),
    "nl4_moe": ({"E": 240, "N": 320, "K": 4096, "top_k": 8},),
}
LAYER = {"Hq": 16, "Hkv": 2, "D": 128, "W": 0, "C": 65536}
ATTENTION = {"attention_fp8": (LAYER,), "attention_bf16": (LAYER,)}
R9700 = Gpu("AMD_Radeon_R9700", "gfx1201", "amdgpu 6.14")
H200 = Gpu("NVIDIA_H200", "", None)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tune.add_parser(parser.add_subparsers(), "")
    return parser.parse_args(["tune", *arguments])


def planned(gpu: Gpu | None, *arguments: str) -> tuple[list[str], bool]:
    found = plan(options(*arguments), SHAPES, gpu)
    return [f"{target} {target.arch}" for target in found.targets], found.gpu is not None


def test_a_supported_gpu_is_measured() -> None:
    targets, measured = planned(R9700)
    assert measured
    assert targets == [
        "nl4_gemm N=2560,K=4096 on AMD_Radeon_R9700 gfx1201",
        "nl4_gemm N=4096,K=1280 on AMD_Radeon_R9700 gfx1201",
        "nl4_moe E=240,N=320,K=4096,top_k=8 on AMD_Radeon_R9700 gfx1201",
    ]
    assert planned(R9700, "--arch", "gfx1201") == (targets, True)


def test_without_a_gpu_both_archs_are_modelled() -> None:
    targets, measured = planned(None, "--kernel", "nl4_moe")
    assert not measured
    assert targets == [
        "nl4_moe E=240,N=320,K=4096,top_k=8 on AMD_Radeon_R9700 gfx1201",
        "nl4_moe E=240,N=320,K=4096,top_k=8 on AMD_Radeon_8060S gfx1151",
    ]


def test_another_arch_than_the_gpus_is_modelled() -> None:
    for gpu in (R9700, H200):
        targets, measured = planned(gpu, "--arch", "gfx1151", "--kernel", "nl4_gemm", "--shape", "K=64,N=32")
        assert (targets, measured) == (["nl4_gemm N=32,K=64 on AMD_Radeon_8060S gfx1151"], False)


def test_attention_is_two_kernels() -> None:
    for arguments in (("--attention",), ("--kernel", "attention"), ("--attention", "--kernel", "attention_fp8")):
        found = plan(options(*arguments), SHAPES | ATTENTION, R9700)
        assert {target.kernel for target in found.targets} == set(ATTENTION)
        assert len(found.targets) == 2
    shape = ("--shape", "Hq=24,Hkv=2,D=128,W=512,C=512")
    [target] = plan(options("--kernel", "attention_fp8", *shape), SHAPES | ATTENTION, R9700).targets
    assert target.path(Path()).name == "Hq=24,Hkv=2,D=128,W=512,C=512,device_name=AMD_Radeon_R9700,dtype=fp8.json"
    with pytest.raises(UsageError, match="one --kernel"):
        plan(options("--attention", *shape), SHAPES | ATTENTION, R9700)
    with pytest.raises(UsageError, match="24 query heads over 1 KV heads"):
        bad = ("--shape", "Hq=24,Hkv=1,D=128,W=512,C=512")
        plan(options("--kernel", "attention_fp8", *bad), SHAPES | ATTENTION, R9700)


@pytest.mark.parametrize(
    ("device", "arch"),
    [("AMD Radeon AI PRO R9700", "gfx1201"), ("AMD_Radeon_RX9070XT", "gfx1201"), ("AMD_Radeon_8060S", "gfx1151")],
)
@pytest.mark.parametrize("there", [True, False])
def test_the_command_of_the_loaders_warning_makes_the_missing_file(device: str, arch: str, there: bool) -> None:
    shape = {"N": 48, "K": 4096}
    words = shlex.split(tune_command("nl4_gemm", shape, device, arch))
    assert words[:2] == ["step128-kernels", "tune"]
    gpu = Gpu(spellings(device)[0], arch, "amdgpu 6.14") if there else None
    found = plan(options(*words[2:]), SHAPES, gpu)
    [target] = found.targets
    assert target.path(Path()).name == file_name("nl4_gemm", shape, spellings(device)[0])
    assert (found.gpu is not None) is there


def test_a_devices_name_is_written_as_vllm_spells_it() -> None:
    arguments = ("--kernel", "nl4_moe", "--arch", "gfx1151", "--device-name", "Radeon 8060S Graphics")
    assert planned(None, *arguments)[0] == ["nl4_moe E=240,N=320,K=4096,top_k=8 on AMD_Radeon_8060S gfx1151"]
    assert planned(R9700, "--device-name", "AMD Radeon AI PRO R9700")[1]


@pytest.mark.parametrize(
    ("gpu", "kind"), [(H200, "not an AMD GPU"), (Gpu("AMD_Radeon_RX7900XTX", "gfx1100", ""), "gfx1100")]
)
def test_another_gpu_is_refused(gpu: Gpu, kind: str) -> None:
    with pytest.raises(UnsupportedGpuError, match=rf"{gpu.name} .*{kind}.*never for or on another") as failure:
        planned(gpu)
    assert failure.value.exit_code == 4


@pytest.mark.parametrize(
    ("gpu", "arguments", "words"),
    [
        (None, ("--shape", "N=1,K=16"), "one --kernel"),
        (None, ("--kernel", "nl4_moe", "--shape", "N=1,K=16"), "has E, N, K, top_k, as in E=240"),
        (None, ("--kernel", "nl4_gemm", "--shape", "N=1,K=24"), "K=24 of nl4_gemm is no multiple of 16"),
        (None, ("--kernel", "nl4_moe", "--shape", "E=4,N=16,K=8,top_k=2"), "K=8 of nl4_moe is no multiple"),
        (None, ("--kernel", "nl4_moe", "--shape", "E=4,N=40,K=16,top_k=2"), "N=40 of nl4_moe is no multiple"),
        (None, ("--kernel", "nl4_moe", "--shape", "E=4,N=16,K=16,top_k=5"), "top_k=5 .* from E=4"),
        (None, ("--device-name", "AMD_Radeon_R9700"), "needs --arch"),
        (R9700, ("--device-name", "AMD_Radeon_8060S"), "this GPU is AMD_Radeon_R9700"),
    ],
)
def test_options_that_do_not_go_together(gpu: Gpu | None, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words) as failure:
        planned(gpu, *arguments)
    assert failure.value.exit_code == 2


@pytest.mark.parametrize("gpu", [None, R9700, H200])
def test_an_unknown_kernel_is_told_whatever_the_gpu(gpu: Gpu | None) -> None:
    with pytest.raises(NoSuchKernelError, match="nl5: no such kernel; there are nl4_gemm, nl4_moe") as failure:
        planned(gpu, "--kernel", "nl5")
    assert failure.value.exit_code == 66


@pytest.mark.parametrize("text", ["N", "N=", "N=0", "N=-1", "N=1,N=2", "=1", "N=1,", "N=1.5", "N=²"])
def test_what_is_no_shape(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options("--shape", text)
    assert "one looks like N=2560,K=4096" in capsys.readouterr().err


def test_where_the_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEP128_CONFIGS_DIR", str(tmp_path))
    monkeypatch.delenv("STEP128_TUNED_DIR", raising=False)
    assert output_folder(None) == tmp_path / "tuned"
    monkeypatch.setenv("STEP128_TUNED_DIR", str(tmp_path / "own"))
    assert output_folder(None) == tmp_path / "own"
    assert output_folder(Path("given")) == Path("given")
    monkeypatch.delenv("STEP128_TUNED_DIR")
    monkeypatch.setattr(tune_options, "shipped_folder", lambda configs: None)
    with pytest.raises(tune_options.NoOutputError, match="--output"):
        output_folder(None)


def fake_torch(monkeypatch: pytest.MonkeyPatch, hip: str | None, **properties: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**properties))
    monkeypatch.setattr(torch.version, "hip", hip)


@pytest.mark.parametrize(
    ("pci_id", "name"),
    [("0x7551", "AMD_Radeon_R9700"), ("0x9999", "AMD_Radeon_Graphics"), (None, "AMD_Radeon_Graphics")],
)
def test_a_gpu_is_named_by_its_pci_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pci_id: str | None, name: str
) -> None:
    place = {"pci_domain_id": 0, "pci_bus_id": 0xC3, "pci_device_id": 0}
    fake_torch(monkeypatch, "7.2", name="AMD Radeon Graphics", gcnArchName="gfx1201:xnack-", **place)
    if pci_id is not None:
        (tmp_path / "bus/pci/devices/0000:c3:00.0").mkdir(parents=True)
        (tmp_path / "bus/pci/devices/0000:c3:00.0/device").write_text(pci_id + "\n")
    gpu = this_gpu(tmp_path)
    assert gpu is not None
    assert (gpu.name, gpu.arch) == (name, "gfx1201")
    assert gpu.driver is not None
    assert gpu.driver.startswith("amdgpu of Linux ")
    (tmp_path / "module/amdgpu").mkdir(parents=True)
    (tmp_path / "module/amdgpu/version").write_text("6.14.14\n")
    assert this_gpu(tmp_path) == Gpu(name, "gfx1201", "amdgpu 6.14.14")


def test_on_nvidia_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_torch(monkeypatch, None, name="NVIDIA H200")
    assert this_gpu() == H200
    monkeypatch.setattr(tune_spaces, "shipped_shapes", lambda: SHAPES)
    with pytest.raises(UnsupportedGpuError, match="NVIDIA_H200"):
        tune.run(options("--output", str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())


class ModelledSpace:
    SHAPES = SHAPES

    @staticmethod
    def candidates(kernel: str, phase: str, shape: Any, m: int, arch: str) -> Any:
        return [{"phase": phase, "BLOCK_M": m, "warps": warps} for warps in (1, 2)]


def test_the_command_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from step128_kernels.tune import model as tune_model
    from step128_kernels.tune.journal import Outcome

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tune_spaces, "shipped_shapes", lambda: SHAPES)
    monkeypatch.setattr(tune_spaces, "space_of", lambda kernel: ModelledSpace)
    monkeypatch.setattr(tune_model, "model_one", lambda candidate: Outcome(seconds=1.0 / candidate.config["warps"]))
    output = tmp_path / "new" / "tuned"
    arguments = ("--kernel", "nl4_gemm", "--arch", "gfx1151", "--output", str(output), "--jobs", "1", "--json")
    assert tune.run(options(*arguments)) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["source"] == "modelled, not measured"
    assert report["written"] == [str(path) for path in sorted(output.iterdir())]
    assert "nothing is measured" in printed.err
    for path, shape in zip(sorted(output.iterdir()), SHAPES["nl4_gemm"], strict=True):
        document = json.loads(path.read_text())
        assert (document["shape"], document["arch"], document["driver"]) == (shape, "gfx1151", None)
        assert document["source"] == "modelled, not measured"
        assert document["versions"]["torch"] == torch.__version__
        assert document["configs"]["512"] == {"phase": "prefill", "BLOCK_M": 512, "warps": 2}
        assert [int(rows) for rows in document["configs"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert tune_device.code_digest() == tune_device.code_digest()
