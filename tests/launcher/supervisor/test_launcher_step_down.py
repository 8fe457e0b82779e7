"""Out of memory at start: the supervisor steps down along the plan's own leaner plans, and says so."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.errors import ExitCode
from step128_launcher.supervisor.job import Patience
from step128_launcher.supervisor.out_of_memory import killed_for_memory, memory_complaint
from step128_launcher.supervisor.status import State
from step128_launcher.supervisor.step_down import given_up

Bench = Any  # the class of the fixture `bench`; a test cannot import conftest.py

# As vLLM 0.32, torch, and the runtimes write them.
COMPLAINTS = [
    "torch.OutOfMemoryError: HIP out of memory. Tried to allocate 1.17 GiB. GPU 0 has a total capacity of 31.86 GiB",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    "RuntimeError: CUDA error: out of memory",
    "RuntimeError: HIP error: out of memory",
    "ValueError: Free memory on device cuda:0 (28.1/31.86 GiB) on startup is less than desired GPU memory utilization "
    "(0.95, 30.27 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
    "ValueError: Available memory on node 0 (0.5/12.59 GiB) on startup is less than desired CPU memory utilization",
    "ValueError: Available memory on node 0 (0.5/9.0 GiB) on kv cache allocation is less than requested memory for kv",
    "ValueError: To serve at least one request with the model's max seq len (4096), (0.02 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (0.0 GiB).",
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
    ":0:rocdevice.cpp:2874: Callback: Queue 0x7f aborting with error : HSA_STATUS_ERROR_OUT_OF_RESOURCES: The runtime "
    "failed to allocate the necessary resources.",
    "gpu3:1:2 [0] NCCL WARN HIP failure 'out of memory'",
    "OSError: [Errno 12] Cannot allocate memory",
    "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory",
]


@pytest.mark.parametrize("line", COMPLAINTS)
def test_every_known_complaint_is_understood(line: str) -> None:
    assert memory_complaint(["INFO fine", line, "RuntimeError: Engine core initialization failed."]) == line


@pytest.mark.parametrize(
    "line", ["INFO Available KV cache memory: 4.5 GiB", "AssertionError: the real cause", "Available RAM: 3 GiB", ""]
)
def test_other_lines_are_not(line: str) -> None:
    assert memory_complaint([line]) is None


def test_a_want_of_memory_that_was_coped_with_does_not_count() -> None:
    caught = "torch.OutOfMemoryError: HIP out of memory. Tried to allocate 2.00 GiB."
    assert memory_complaint([caught, "AssertionError: the real cause"]) is None


@pytest.mark.parametrize(
    "after",
    [
        ["RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:40000"],
        ["Exception ignored in: <function Pool.__del__ at 0x7f>", "AttributeError: 'Pool' object has no attribute 'x'"],
        ["Exception: WorkerProc initialization failed due to an exception in a background process."],
    ],
)
def test_what_follows_from_it_does_not_hide_it(after: list[str]) -> None:
    cause = "torch.OutOfMemoryError: HIP out of memory. Tried to allocate 2.00 GiB."
    assert memory_complaint([cause, *after]) == cause


def test_a_kill_is_for_memory_only_if_the_kernel_counted_one() -> None:
    assert killed_for_memory(3, 4) and not killed_for_memory(3, 3)
    assert not killed_for_memory(None, 4) and not killed_for_memory(3, None)


def test_steps_down_until_it_fits(bench: Bench) -> None:
    bench.leaner(2048, 1024)
    assert bench.run("memory", "memory", "ok", signals=(signal.SIGTERM,), starts=3) is ExitCode.OK
    snapshot = bench.status.snapshot()
    assert snapshot.state is State.STOPPED and snapshot.step_downs == 2 and not snapshot.restarts
    assert snapshot.plan.max_model_len == 1024  # what the exporter shows is what runs
    text = bench.text()
    assert "Stepping down, 1 more left: context 4096 -> 2048." in text
    assert "Stepping down, 0 more left: context 2048 -> 1024." in text
    assert "Tried to allocate 1.17 GiB" in text and "PASS max_model_len: 1024" in text
    for number in (1, 2):
        assert "OutOfMemoryError" in bench.job.log.with_name(f"vllm.log.{number}").read_text()
    assert "OutOfMemoryError" not in bench.job.log.read_text()
    assert json.loads((bench.job.state_dir / "status.json").read_text())["step_downs"] == 2
    bench.assert_nothing_left()


def test_out_of_memory_to_the_end_is_exit_3_with_all_that_was_tried(bench: Bench) -> None:
    bench.leaner(3072, 2048, 1024, 512)  # one more than is tried
    error = bench.fail("memory")
    assert error.exit_code == ExitCode.DOES_NOT_FIT and bench.starts() == 4
    for number, context in enumerate((4096, 3072, 2048, 1024), start=1):
        assert f"{number}. context {context}" in error.message
    assert "512" not in error.message and "--max-model-len" in error.hint


def test_without_a_leaner_plan(bench: Bench) -> None:
    error = bench.fail("memory")
    assert error.exit_code == ExitCode.DOES_NOT_FIT and bench.starts() == 1


def test_stepping_down_can_be_turned_off(bench: Bench) -> None:
    bench.leaner(2048)
    bench.patience = Patience(max_step_downs=0)
    assert bench.fail("memory").exit_code == ExitCode.DOES_NOT_FIT and bench.starts() == 1


def test_the_kernel_s_own_count_tells_a_kill_for_memory(bench: Bench, tmp_path: Path) -> None:
    """The first start is killed while the machine's count of such kills goes up; what else is in /proc is real."""
    root = tmp_path / "root"
    (root / "proc").mkdir(parents=True)
    vmstat = root / "proc/vmstat"
    vmstat.write_text("nr_free_pages 5\noom_kill 7\n")
    bench.leaner(2048)
    bench.patience = Patience(root=root)
    count = f"from pathlib import Path; Path({str(vmstat)!r}).write_text('oom_kill 8'); "
    argv = (bench.job.argv[0], "-S", "-c", count + "import os; os.kill(os.getpid(), 9)")
    error = bench.fail("ok", argv=argv)
    # The count stands at 8 before the second start, so that kill came from elsewhere.
    assert error.exit_code == ExitCode.SERVER_FAILED and "Killed from outside" in error.message
    assert bench.status.snapshot().step_downs == 1 and "The kernel killed it" in bench.text()


def test_what_is_given_up_is_said_in_words(bench: Bench) -> None:
    plan = bench.plan
    leaner = replace(plan, max_model_len=1024, num_speculative_tokens=0, vision=not plan.vision)
    text = given_up(plan, leaner)
    assert "context 4096 -> 1024" in text and "MTP depth 3 -> 0" in text and "vision" in text
    assert given_up(plan, plan) == "the same settings"
