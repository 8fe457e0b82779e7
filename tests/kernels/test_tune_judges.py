"""The two judges: measuring (a wrong result is never timed) and modelling (gates, other processes)."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from step128_kernels.errors import KernelToolError
from step128_kernels.tune.journal import Outcome
from step128_kernels.tune.measure import GpuLostError, GpuMemoryError, measure_all, wrong_result
from step128_kernels.tune.model import modelling, outcome_of
from step128_kernels.tune.search import Candidate, Target

TARGET = Target("nl4_gemm", {"N": 64, "K": 128}, "AMD_Radeon_R9700", "gfx1201")
RIGHT = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))


def candidate(rows: int = 1, phase: str = "decode", kernel: str = "nl4_gemm", **config: int) -> Candidate:
    return Candidate(Target(kernel, TARGET.shape, TARGET.device, TARGET.arch), rows, {"phase": phase, **config})


class Runners:
    """Calls whose results are given by the configuration's `kind`; counts the reference's calls."""

    def __init__(self, results: Mapping[int, Callable[[], Any]]) -> None:
        self.results = results
        self.references = 0

    def runner(self, kernel: str, shape: Any, m: int, config: Any) -> Any:
        return self.results[config["kind"]], self._reference

    def _reference(self) -> torch.Tensor:
        self.references += 1
        return RIGHT


def fail(error: Exception) -> Any:
    raise error


def measured(space: Any, candidates: list[Candidate], check: Callable[[], None] = lambda: None) -> list[Outcome]:
    timed = iter(range(1, 100))
    return [outcome for _, outcome in measure_all(space, candidates, lambda call: float(next(timed)), check)]


def test_only_right_results_are_timed() -> None:
    space = Runners(
        {
            0: lambda: RIGHT.to(torch.bfloat16),
            1: lambda: RIGHT * 1.02,
            2: lambda: RIGHT[:4],
            3: lambda: RIGHT * float("nan"),
            4: lambda: fail(RuntimeError("out of resources: shared memory\nmore")),
        }
    )
    found = measured(space, [candidate(kind=kind) for kind in range(5)])
    assert found == [
        Outcome(seconds=1.0),
        Outcome(problem="wrong result"),
        Outcome(problem="wrong result: shape (4, 512) instead of (8, 512)"),
        Outcome(problem="wrong result: not finite"),
        Outcome(problem="RuntimeError: out of resources: shared memory"),
    ]
    assert space.references == 1


def test_the_reference_is_made_once_for_each_number_of_rows() -> None:
    space = Runners({kind: lambda: RIGHT for kind in (0, 1)})
    measured(space, [candidate(rows, kind=kind) for kind in (0, 1) for rows in (1, 8, 16)])
    assert space.references == 3


def test_one_wrong_group_of_weights_is_seen() -> None:
    """A result off by what the wrong scale of one group costs (a tenth of a typical result), among 4096 right ones."""
    wrong = RIGHT.clone()
    wrong.view(-1)[int(RIGHT.abs().argmin())] += 0.1
    assert wrong_result(wrong, RIGHT) == "wrong result: single values"
    assert wrong_result(RIGHT.to(torch.bfloat16), RIGHT) is None
    assert wrong_result(RIGHT.to(torch.float16), RIGHT) is None
    assert wrong_result(torch.zeros(2), torch.zeros(2)) is None
    assert wrong_result(torch.ones(2), torch.zeros(2)) == "wrong result"


def test_a_candidate_that_breaks_the_gpu_is_kept_and_ends_the_run() -> None:
    """In the same process every later candidate would fail too, and would be ruled out for good."""
    space = Runners({0: lambda: fail(RuntimeError("HIP error: illegal memory access")), 1: lambda: RIGHT})
    outcomes = measure_all(
        space,  # type: ignore[arg-type]
        [candidate(kind=0), candidate(kind=1)],
        lambda call: 1.0,
        lambda: fail(RuntimeError("HIP error")),
    )
    assert next(outcomes)[1].problem is not None
    with pytest.raises(GpuLostError, match=r"at 1 rows with .*kind.*Run the same command again"):
        next(outcomes)


def test_inputs_that_do_not_fit_rule_nothing_out() -> None:
    class Full(Runners):
        def _reference(self) -> torch.Tensor:
            raise torch.OutOfMemoryError("2 GiB")

    with pytest.raises(GpuMemoryError, match="does not fit"):
        measured(Full({0: lambda: RIGHT}), [candidate(kind=0)])


@dataclass
class Report:
    spills: int = 0
    scratch_bytes: int = 0
    waves_per_simd: float = 8.0
    valu_per_weight: float = 4.0
    wmma: int = 0
    ranking_seconds: float = 1e-5
    tile_bits: int | None = 128
    workgroups: int = 1
    lane_inst_per_byte: float = 0.0

    @property
    def load_bits(self) -> dict[str, int]:
        return {"?": 128} if self.tile_bits is None else {"tiles_ptr": self.tile_bits}


@pytest.mark.parametrize(
    ("report", "judged", "missed"),
    [
        (Report(), candidate(1), None),
        (Report(waves_per_simd=7.9), candidate(1), "fewer than 8 waves per SIMD"),
        (Report(valu_per_weight=4.1), candidate(1), "more than 4 vector operations per weight"),
        (Report(valu_per_weight=6.0), candidate(2), None),
        (Report(valu_per_weight=6.1), candidate(4), "more than 6 vector operations per weight"),
        (Report(valu_per_weight=8.0), candidate(8), None),
        (Report(valu_per_weight=8.1), candidate(8), "more than 8 vector operations per weight"),
        (Report(valu_per_weight=80.0), candidate(16), None),
        (Report(), candidate(16, "prefill"), "no WMMA"),
        (Report(tile_bits=64), candidate(1), "weights are loaded by fewer than 128 bits"),
        (Report(tile_bits=None), candidate(1), "the width of weight loads could not be told"),
        (Report(tile_bits=None), candidate(1, "decode", "vllm_fused_moe"), None),
        (Report(wmma=1, tile_bits=64), candidate(64, "prefill"), "weights are loaded by fewer than 128 bits"),
        (Report(wmma=1, waves_per_simd=1.0, valu_per_weight=80.0), candidate(8, "prefill"), None),
        (Report(valu_per_weight=80.0), candidate(1, "decode", "vllm_fused_moe"), None),
    ],
)
def test_gates(report: Report, judged: Candidate, missed: str | None) -> None:
    assert outcome_of(report, judged) == Outcome(seconds=1e-5, missed=missed)


@dataclass
class AttentionReport(Report):
    """Loads no weights, and misses what the gates of weights ask for."""

    wmma: int = 1
    waves_per_simd: float = 1.0
    valu_per_weight: float = 80.0
    tile_bits: int | None = None
    workgroups: int = 128
    lane_inst_per_byte: float = 3.0


def attention(
    rows: int = 1, phase: str = "decode", kv: str = "fp8", context: int = 65536, window: int = 0, arch: str = "gfx1201"
) -> Candidate:
    shape = {"Hq": 16, "Hkv": 2, "D": 128, "W": window, "C": context}
    return Candidate(Target(f"attention_{kv}", shape, "some GPU", arch), rows, {"phase": phase})


@pytest.mark.parametrize(
    ("report", "judged", "missed"),
    [
        (AttentionReport(), attention(), None),
        (AttentionReport(wmma=0), attention(), "no WMMA"),
        (AttentionReport(wmma=0), attention(2048, "prefill"), "no WMMA"),
        (AttentionReport(workgroups=127), attention(), "fewer than 2 work-groups for each compute unit"),
        (AttentionReport(workgroups=127), attention(context=204800), "fewer than 2 work-groups for each compute unit"),
        (AttentionReport(workgroups=1), attention(context=8192), None),
        (AttentionReport(workgroups=80, lane_inst_per_byte=30), attention(arch="gfx1151"), None),
        (AttentionReport(workgroups=79), attention(arch="gfx1151"), "fewer than 2 work-groups for each compute unit"),
        (AttentionReport(lane_inst_per_byte=3.1), attention(), "more than 3 instructions per byte of the KV cache"),
        (AttentionReport(lane_inst_per_byte=8.0), attention(4), None),
        (AttentionReport(lane_inst_per_byte=8.1), attention(4), "more than 8 instructions per byte of the KV cache"),
        (AttentionReport(lane_inst_per_byte=30), attention(32), None),
        (AttentionReport(lane_inst_per_byte=30), attention(kv="bf16"), None),
        (AttentionReport(lane_inst_per_byte=30), attention(context=1024), None),
        (AttentionReport(workgroups=1, lane_inst_per_byte=30), attention(context=512, window=512), None),
        (AttentionReport(workgroups=1, lane_inst_per_byte=30), attention(2048, "prefill"), None),
    ],
)
def test_gates_of_attention(report: AttentionReport, judged: Candidate, missed: str | None) -> None:
    assert outcome_of(report, judged) == Outcome(seconds=1e-5, missed=missed)


def test_spills_rule_attention_out() -> None:
    assert outcome_of(AttentionReport(spills=1), attention()) == Outcome(problem="spills registers")


@pytest.mark.parametrize("report", [Report(spills=1), Report(scratch_bytes=4, tile_bits=64)])
@pytest.mark.parametrize(
    "judged", [candidate(1), candidate(8, "prefill"), candidate(1, "decode", "vllm_fused_moe")], ids=str
)
def test_spilled_registers_rule_out(report: Report, judged: Candidate) -> None:
    assert outcome_of(report, judged) == Outcome(problem="spills registers")


JUDGES = """
import os, time
from step128_kernels.tune.journal import Outcome

def judge(candidate):
    return Outcome(seconds=float(candidate.config["kind"]) + os.getpid() / 1e9)

def die(candidate):
    os._exit(7)

def sleep(candidate):
    if candidate.config["kind"]:
        print(os.getpid(), flush=True)
        time.sleep(60)
    return Outcome(seconds=1.0)
"""


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Functions that another process can import."""
    (tmp_path / "judges_of_test.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(str(tmp_path))
    import judges_of_test  # type: ignore[import-not-found]

    return judges_of_test


def run_modelling(judge_one: Any, count: int) -> dict[int, Outcome]:
    with modelling(judge_one, 2) as judge:
        first = list(judge([candidate(kind=kind) for kind in range(count // 2)]))
        return {
            one.config["kind"]: outcome
            for one, outcome in [*first, *judge([candidate(kind=kind) for kind in range(count // 2, count)])]
        }


def test_other_processes_judge(judges: Any) -> None:
    found = run_modelling(judges.judge, 4)
    assert sorted(found) == [0, 1, 2, 3]
    assert all(found[kind].seconds != kind + os.getpid() / 1e9 for kind in found)
    assert all(int(found[kind].seconds or -1) == kind for kind in found)


def test_a_process_that_dies_is_told(judges: Any) -> None:
    with pytest.raises(KernelToolError, match="compiling process died"):
        run_modelling(judges.die, 3)


def test_a_killed_run_leaves_no_process_behind(judges: Any, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        from step128_kernels.tune.model import modelling
        from step128_kernels.tune.search import Candidate, Target
        import judges_of_test

        if __name__ == "__main__":
            target = Target("nl4_gemm", {}, "d", "a")
            with modelling(judges_of_test.sleep, 2) as judge:
                list(judge([Candidate(target, 1, {"kind": kind}) for kind in (0, 1)]))
        """)
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    os.kill(worker, signal.SIGINT)  # a terminal sends it to every process; it is the parent's to handle
    time.sleep(0.5)
    assert process.poll() is None
    assert Path(f"/proc/{worker}").exists()
    process.kill()
    try:
        process.communicate(timeout=20)  # the pipe closes when no process holds it any more
    except subprocess.TimeoutExpired:
        os.kill(worker, signal.SIGKILL)
        raise
