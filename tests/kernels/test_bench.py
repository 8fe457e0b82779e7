"""The benchmark's order and words, with fakes for the GPU and its clock; and its checks under Triton's interpreter."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_kernels.bench import command
from step128_kernels.bench.command import nvidia_driver
from step128_kernels.bench.measure import Load, Result, Subject, Task, Timing
from step128_kernels.bench.report import Setting
from step128_kernels.bench.selection import select_tasks
from step128_kernels.bench.timing import summary
from step128_kernels.cases import SHAPES
from step128_kernels.cli import main
from step128_kernels.errors import NoSuchKernelError
from step128_kernels.testing import Closeness
from step128_kernels.tune.options import UsageError

RIGHT = Closeness(0.002, 0.0055, 0.3, None)
WRONG = Closeness(0.5, 0.0055, 40.0, "typical error 0.5")
WEIGHTS = 1_000_000
SECONDS = {"nl4_gemm": 2e-6, "nl4_moe": 4e-6, "fast rival": 6e-6, "slow rival": 8e-6}
TASKS = [Task("nl4_gemm", {"N": 1000, "K": 1000}, 1), Task("nl4_moe", {"E": 8, "N": 16, "K": 32, "top_k": 2}, 8)]
SETTING = Setting("NVIDIA_H200", "", "nvidia 550.54", {"torch": "2.13.0"}, "2026-01-02", "by hand", None)


class FakeMachine:
    """Says that everything is right, but for the names in ``wrong``; takes SECONDS for a call."""

    def __init__(self, wrong: Mapping[str, str] | None = None, rivals: tuple[str, ...] = tuple(SECONDS)[2:]) -> None:
        self.wrong, self.rivals, self.timed, self.copies = dict(wrong or {}), rivals, 0, 0

    def check(self, task: Task) -> Result:
        assert not self.timed, "nothing is checked after something was timed"
        return Result(task, self._subject(task.kernel, 5), tuple(self._subject(name, 4.5) for name in self.rivals))

    def _subject(self, name: str, bits: float) -> Subject:
        subject = Subject(name, Load(WEIGHTS, int(WEIGHTS * bits / 8)), "decode", {"BLOCK_M": 1}, RIGHT)
        return replace(subject, closeness=WRONG, problem=self.wrong[name]) if name in self.wrong else subject

    def time(self, result: Result) -> Result:
        self.timed += 1
        return Result(result.task, self._timed(result.ours), tuple(map(self._timed, result.rivals)))

    def _timed(self, subject: Subject) -> Subject:
        seconds = SECONDS[subject.name]
        timing = Timing(seconds, 0.9 * seconds, 1.2 * seconds, 100)
        return subject if subject.problem else replace(subject, timing=timing)

    def copy(self) -> tuple[int, Timing | None, str | None]:
        self.copies += 1
        return 2_000_000, Timing(4e-6, 4e-6, 4e-6, 100), None


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(machine: FakeMachine, *arguments: str, setting: Setting = SETTING) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr(command, "_prepare", lambda parsed: (TASKS, machine, setting))
        code = main(["bench", *arguments])
        printed = capsys.readouterr()
        return code, json.loads(printed.out.splitlines()[-1]), printed.err

    return run


def test_everything_right(bench: Any) -> None:
    code, document, said = bench(FakeMachine())
    assert (code, document["exit_code"], document["correct"]) == (0, 0, True)
    gemm, moe = document["results"]
    assert gemm["ours"]["bytes_per_second"] == pytest.approx(625_000 / 2e-6)
    assert document["copy"]["bytes_per_second"] == pytest.approx(5e11)
    assert gemm["ours"]["share_of_copy"] == pytest.approx(0.625)
    # The same weights in 6 µs and 2 µs, whatever the bytes of the formats; the faster rival counts.
    assert gemm["speedup_per_weight"] == pytest.approx(3.0) and gemm["speedup_over"] == "fast rival"
    assert moe["speedup_per_weight"] == pytest.approx(1.5)
    assert "3.00x" in said and "1.50x" in said and "2.0 (1.8-2.4)" in said
    assert (document["device"], document["driver"], document["versions"]["torch"]) == (
        "NVIDIA_H200",
        "nvidia 550.54",
        "2.13.0",
    )


@pytest.mark.parametrize("wrong", ["nl4_gemm", "nl4_moe"])
def test_one_wrong_kernel_of_ours_silences_all_times(bench: Any, wrong: str) -> None:
    machine = FakeMachine({wrong: "typical error 0.5"})
    code, document, said = bench(machine)
    assert (code, document["exit_code"], document["correct"]) == (70, 70, False)
    assert (machine.timed, machine.copies, document["copy"]) == (0, 0, None)
    assert [one["speedup_per_weight"] for one in document["results"]] == [None, None]
    assert f"WRONG: {wrong}" in said and "x │" not in said and "nothing is compared" in said


def test_a_kernel_that_fails_when_timed_silences_all_speedups(bench: Any) -> None:
    class Failing(FakeMachine):
        def _timed(self, subject: Subject) -> Subject:
            found = super()._timed(subject)
            return replace(found, timing=None, problem="not timed: boom") if subject.name == "nl4_moe" else found

    code, document, _ = bench(Failing())
    assert code == 70
    assert [one["speedup_per_weight"] for one in document["results"]] == [None, None]


def test_a_wrong_rival_is_left_out_and_said(bench: Any) -> None:
    code, document, said = bench(FakeMachine({"fast rival": "typical error 0.5"}))
    assert code == 0
    assert document["results"][0]["speedup_over"] == "slow rival"
    assert document["results"][0]["speedup_per_weight"] == pytest.approx(4.0)
    assert "WRONG: fast rival" in said


def test_without_vllm_ours_and_the_copy(bench: Any) -> None:
    setting = replace(SETTING, vllm_missing="vLLM is not installed here")
    code, document, said = bench(FakeMachine(rivals=()), setting=setting)
    assert code == 0
    assert document["results"][0]["speedup_per_weight"] is None and document["results"][0]["vllm"] == []
    assert document["results"][0]["ours"]["share_of_copy"] == pytest.approx(0.625)
    assert "Ours and the copy only: vLLM is not installed here." in said


@pytest.mark.parametrize(("arch", "portable"), [("", True), ("gfx1201", False)])
def test_a_portable_path_is_called_so(bench: Any, arch: str, portable: bool) -> None:
    _, document, said = bench(FakeMachine(), setting=replace(SETTING, arch=arch))
    assert document["portable"] is portable
    assert ("the portable path of our kernels was measured" in said) is portable


@pytest.mark.parametrize("json_only", [True, False])
def test_the_last_line_is_the_document_with_and_without_the_table(bench: Any, json_only: bool) -> None:
    _, document, said = bench(FakeMachine(), *["--json"] * json_only)
    assert document["schema"] == 1
    assert ("speed-up per weight" in said.split("Device:")[0]) is not json_only


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_without_a_gpu_nothing_is_claimed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("step128_kernels.gpu.this_gpu", lambda: None)
    assert main(["bench", *arguments]) == 4
    printed = capsys.readouterr()
    document = json.loads(printed.out.splitlines()[-1])
    assert document.keys() == {"error", "exit_code"} and document["exit_code"] == 4
    assert "torch sees none here. Nothing was measured." in printed.err


@pytest.mark.parametrize(("arguments", "code"), [(["--kernel", "nl5"], 66), (["--shape", "N=16,K=24"], 2)])
def test_mistakes_are_told_before_a_gpu_is_looked_for(
    arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("step128_kernels.gpu.this_gpu", lambda: pytest.fail("looked for a GPU"))
    assert main(["bench", *arguments]) == code
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["exit_code"] == code


@pytest.mark.parametrize("arguments", [[], ["--json"]])
@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        (ZeroDivisionError("boom"), 1, "internal error: ZeroDivisionError('boom')"),
        (PermissionError(13, "denied", "/closed"), 5, "permission denied: /closed"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_whatever_goes_wrong_the_last_line_is_one_document(
    arguments: list[str], failure: BaseException, code: int, words: str, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(FakeMachine):
        def check(self, task: Task) -> Result:
            raise failure

    found, document, said = bench(Failing(), *arguments)
    assert (found, document["exit_code"]) == (code, code)
    assert words in document["error"] and words in said


def test_tasks_of_a_shape_are_side_by_side() -> None:
    tasks = select_tasks(list(SHAPES), None, (1, 8))
    assert len(tasks) == 2 * sum(map(len, SHAPES.values()))
    assert [task.m for task in tasks[:4]] == [1, 8, 1, 8] and tasks[0].shape == tasks[1].shape
    (one,) = select_tasks(None, [{"N": 48, "K": 64}], (3,))
    assert one == Task("nl4_gemm", {"N": 48, "K": 64}, 3)


def test_unknown_kernels_and_shapes_are_refused() -> None:
    with pytest.raises(NoSuchKernelError, match=r"gemm: no such kernel; there are nl4_gemm, nl4_moe"):
        select_tasks(["gemm"], None, (1,))
    with pytest.raises(UsageError, match=r"nl4_gemm: N=…,K=…; nl4_moe: E=….*; attention_fp8: Hq=…,Hkv=…,D=…,W=…"):
        select_tasks(None, [{"N": 48}], (1,))


def test_a_timing_is_the_median_and_the_middle_of_the_calls() -> None:
    outliers = [5.0, *[1.0 + i / 10 for i in range(9)]]
    assert summary(outliers) == Timing(1.5, 1.2, 1.7, 10)


def test_driver_of_nvidia(tmp_path: Path) -> None:
    path = tmp_path / "version"
    assert nvidia_driver(path) is None
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n")
    assert nvidia_driver(path) == "nvidia 550.54.15"


_INTERPRETED = """
import sys, torch
from step128_kernels.bench import nl4
from step128_kernels.bench.command import bench
from step128_kernels.bench.gpu import GpuMachine, Vllm
from step128_kernels.bench.measure import Task, Timing
from step128_kernels.bench.report import Setting

if sys.argv[1] == "broken":
    right = nl4.moe_runner
    def broken(*arguments, **keywords):
        call, reference = right(*arguments, **keywords)
        return (lambda: call() * 1.05), reference
    nl4.moe_runner = broken
moe = {"E": 5, "N": 48, "K": 96, "top_k": 2}
tasks = [Task("nl4_gemm", {"N": 80, "K": 80}, m) for m in (1, 3)] + [Task("nl4_moe", moe, m) for m in (1, 3)]
time = lambda call: Timing(1e-6, 1e-6, 1e-6, 1)
machine = GpuMachine(Vllm(missing="not asked"), time, lambda: (2, time(None)), device="cpu", dtype=torch.float16)
sys.exit(bench(tasks, machine, Setting("CPU", "", None, {}, "", "faked", "not asked"), quiet=False))
"""


@pytest.mark.parametrize(("state", "code"), [("right", 0), ("broken", 70)])
def test_our_kernels_are_really_checked(state: str, code: int) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED, state], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == code, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    problems = [one["ours"]["problem"] for one in document["results"]]
    assert problems[:2] == [None, None]
    assert [problem is None for problem in problems[2:]] == [state == "right"] * 2
    assert all(0 < one["ours"]["typical_error"] < 1e-3 for one in document["results"] if not one["ours"]["problem"])
