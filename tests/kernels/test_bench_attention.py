"""Attention in the benchmark: what is measured, wrong results, ours and vLLM's kernels in Triton's interpreter."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from step128_kernels.attention.configs import KERNELS
from step128_kernels.attention.shape import AttentionCall, AttentionShape
from step128_kernels.bench.attention import LAYERS, Attention, Batches, call_of
from step128_kernels.bench.families import Place
from step128_kernels.bench.measure import Load, Task
from step128_kernels.bench.selection import select_tasks
from step128_kernels.cli import main
from step128_kernels.tune.options import UsageError

FULL = {"Hq": 16, "Hkv": 2, "D": 128, "W": 0}
SLIDING = {"Hq": 24, "Hkv": 2, "D": 128, "W": 512}


def test_the_usual_tasks_are_those_that_were_promised() -> None:
    """1k, 8k, 64k, 200k x 1 and 4 query tokens x 1 and 8 sequences; sliding layers at one context."""
    tasks = select_tasks(["attention_fp8"], [FULL, SLIDING], (1,))
    found = [(task.shape["W"], task.shape["context"], task.shape["batch"], task.shape["q_len"]) for task in tasks]
    deep = [(0, *sizes) for sizes in _product((1024, 8192, 65536, 204800), (1, 8), (1, 4))]
    assert found == deep + [(512, *sizes) for sizes in _product((8192,), (1, 8), (1, 4))]
    assert [task.m for task in tasks[:4]] == [1, 4, 8, 32]


def _product(*sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for some in sizes:
        found = [(*one, size) for one in found for size in some]
    return found


@pytest.mark.parametrize("kernel", KERNELS.values())
def test_every_layer_of_the_model_is_measured_once(kernel: str) -> None:
    assert len(LAYERS[kernel]) == 8  # full and sliding, at tensor parallelism 1, 2, 4 and 8
    assert FULL in LAYERS[kernel] and SLIDING in LAYERS[kernel]
    assert len(select_tasks([kernel], None, (1, 2, 3))) == 4 * 16 + 4 * 4


def test_other_batches() -> None:
    tasks = select_tasks(["attention_bf16"], [SLIDING], (1,), Batches((600, 2048), (512,), (3,)))
    assert [task.shape for task in tasks] == [
        SLIDING | {"context": context, "batch": 3, "q_len": 512} for context in (600, 2048)
    ]
    with pytest.raises(UsageError, match="--q-len 512 is more than --context 100"):
        select_tasks(["attention_bf16"], [SLIDING], (1,), Batches((600, 100), (512,), (3,)))
    with pytest.raises(UsageError, match="17 query heads over 2 KV heads"):
        select_tasks(["attention_bf16"], [FULL | {"Hq": 17}], (1,))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--attention", "--shape", "Hq=16,Hkv=2,D=96,W=0"], 2),
        (["--attention", "--shape", "N=16,K=32"], 2),
        (["--attention", "--context", "16", "--q-len", "17"], 2),
        (["--kernel", "attention_fp4"], 66),
        (["--attention", "--shape", "Hq=16,Hkv=2,D=128,W=0"], 4),
        (["--kernel", "attention", "--context", "1024", "--batch", "2"], 4),
    ],
)
def test_the_command_line(
    arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mistakes, and what is right but has no GPU to be measured on."""
    monkeypatch.setattr("step128_kernels.gpu.this_gpu", lambda: None)
    assert main(["bench", *arguments]) == code
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["exit_code"] == code


@pytest.mark.parametrize(
    ("kernel", "layer", "sizes", "bytes_"),
    [
        ("attention_fp8", FULL, (65536, 1, 4), 65536 * 2 * 128 * 2),
        ("attention_bf16", FULL, (1024, 8, 1), 8 * 1024 * 2 * 128 * 2 * 2),
        ("attention_fp8", SLIDING, (8192, 1, 4), (512 + 3) * 2 * 128 * 2),  # the windows of 4 queries
        ("attention_fp8", SLIDING, (100, 1, 1), 100 * 2 * 128 * 2),
    ],
)
def test_what_is_read(kernel: str, layer: dict[str, int], sizes: tuple[int, int, int], bytes_: int) -> None:
    task = Task(kernel, layer | dict(zip(("context", "batch", "q_len"), sizes, strict=True)), sizes[1] * sizes[2])
    place = Place("cpu", torch.bfloat16)
    load = Attention().load(task, Attention().config(task, place), place)
    assert load == Load(bytes_, bytes_, "KV byte")


def test_the_call_of_a_task() -> None:
    sizes = {"context": 100, "batch": 8, "q_len": 4}
    found = call_of(Task("attention_fp8", SLIDING | sizes, 32), torch.float16)
    assert found == AttentionCall(AttentionShape(24, 2, 128, 512, 16, "fp8", "fp16"), 8, 4, 100)
    found = call_of(Task("attention_bf16", FULL | sizes, 32), torch.bfloat16)
    assert found == AttentionCall(AttentionShape(16, 2, 128, 0, 16, "bf16", "bf16"), 8, 4, 100)


_INTERPRETED = """
import sys, torch
from step128_kernels.bench import attention, gpu
from step128_kernels.bench.attention import Batches
from step128_kernels.bench.command import bench
from step128_kernels.bench.gpu import GpuMachine, Vllm, find_vllm
from step128_kernels.bench.measure import Timing
from step128_kernels.bench.report import Setting
from step128_kernels.bench.selection import select_tasks

right = attention.attention_runner
def broken(call, config, device):
    kernel, reference = right(call, config, device)
    return (lambda: kernel() * 1.03), reference
vllm, rows = find_vllm(), (1, 4)
if sys.argv[1] == "broken":
    attention.attention_runner, vllm, rows = broken, Vllm(missing="not asked"), (1,)
seconds = iter(range(1, 1000))
time = lambda call: Timing(float(next(seconds)), 1e-6, 1e-6, 1)
layers = [{"Hq": 8, "Hkv": 2, "D": 64, "W": 0}, {"Hq": 12, "Hkv": 1, "D": 64, "W": 32}]
tasks = select_tasks(["attention_fp8", "attention_bf16"], layers, (1,), Batches((90,), rows, (2,)))
machine = GpuMachine(vllm, time, lambda: (2, time(None)), device="cpu", dtype=torch.float16)
sys.exit(bench(tasks, machine, Setting("CPU", "", None, {}, "", "faked", vllm.missing), quiet=False))
"""


def interpreted(state: str) -> tuple[int, dict[str, Any], str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED, state], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_ours_and_vllms_are_right_and_compared() -> None:
    """The same keys and values in both orders, scales that are not 1, pages in random order."""
    pytest.importorskip("vllm")
    code, document, said = interpreted("right")
    assert code == 0, said
    assert [one["shape"]["W"] for one in document["results"]] == [0, 0, 32, 32] * 2
    for one in document["results"]:
        assert one["unit"] == "KV byte" and one["ours"]["bytes"] == one["ours"]["weights"]
        subjects = [one["ours"], *one["vllm"]]
        assert [subject["name"] for subject in subjects] == [one["kernel"], "vllm_unified", "vllm_segmented"]
        assert [subject["problem"] for subject in subjects] == [None] * 3
        assert all(0 < subject["typical_error"] < 1e-3 for subject in subjects)
        times = [subject["seconds"]["median"] for subject in subjects]
        assert one["speedup_per_weight"] == pytest.approx(min(times[1:]) / times[0])


def test_a_wrong_result_of_ours_is_seen_and_silences_all_times() -> None:
    code, document, said = interpreted("broken")
    assert code == 70
    assert all("typical error" in one["ours"]["problem"] for one in document["results"])
    assert all(one["speedup_per_weight"] is None and one["ours"]["seconds"] is None for one in document["results"])
    assert "WRONG: attention_fp8 Hq=8" in said and "nothing is compared" in said
