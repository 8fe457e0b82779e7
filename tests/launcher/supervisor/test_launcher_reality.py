"""What vLLM says about its own start, from the texts of version 0.32, and the comparison with the plan."""

import importlib.util
import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.supervisor.comparison import ITEMS, compare, format_value, measured_figures, planned_figures
from step128_launcher.supervisor.exporter import Exporter
from step128_launcher.supervisor.reality import Reality, read_reality

Bench = Any  # the class of the fixture `bench`; a test cannot import conftest.py
GIB = 2**30

# Written from the format strings of vLLM 0.32 (v1/worker/gpu_worker.py and others), not recorded on a GPU.
GPU_LOG = """\
(Worker_TP0 pid=8) INFO 11-23 16:30:00 [model_runner.py:424] Model loading took 26.13 GiB memory and 301.500000 seconds
(Worker_TP1 pid=9) INFO 11-23 16:30:01 [model_runner.py:424] Model loading took 26.25 GiB memory and 310.250000 seconds
\x1b[1;36m(Worker_TP0 pid=8)\x1b[0;0m INFO 11-23 16:30:02 [gpu_worker.py:759] Available KV cache memory: 1.50 GiB
(Worker_TP0 pid=8) INFO 11-23 16:30:02 [gpu_worker.py:770] CUDA graph memory profiling is enabled (default since \
v0.21.0). The current --gpu-memory-utilization=0.9500 is equivalent to --gpu-memory-utilization=0.9343
(EngineCore pid=7) INFO 11-23 16:30:03 [kv_cache_utils.py:2327] GPU KV cache size: 958,698 tokens, \
Maximum concurrency for 204,800 tokens per request: 4.68x
(Worker_TP0 pid=8) INFO 11-23 16:30:09 [model_runner.py:1127] Graph capturing finished in 12 secs, took 0.44 GiB
(Worker_TP0 pid=8) INFO 11-23 16:30:09 [gpu_worker.py:971] CUDA graph pool memory: 0.44 GiB (actual), 0.5 GiB \
(estimated), difference: 0.06 GiB (13.6%).
(Worker_TP0 pid=8) INFO 11-23 16:30:09 [gpu_worker.py:1045] Free memory on device (31.5/31.86 GiB) on startup. \
Desired GPU memory utilization is (0.95, 30.27 GiB). Actual usage is 27.0 GiB for consumed memory (weights + \
non-torch), 1.67 GiB for peak activation, and 0.44 GiB for CUDAGraph memory. Replace gpu_memory_utilization config \
with `--kv-cache-memory=1` (0.0 GiB) to fit into requested memory, or `--kv-cache-memory=2` (0.0 GiB).
""".splitlines()

# Lines of a real start on a CPU.
CPU_LOG = """\
(Worker pid=10889) INFO 11-23 16:54:04 [default_loader.py:501] Loading weights took 0.09 seconds
(Worker pid=10889) INFO 11-23 16:54:05 [default_loader.py:501] Loading weights took 0.08 seconds
(Worker pid=10889) INFO 11-23 16:54:06 [cpu_worker.py:260] Explicitly set (0.12/12.59) GiB for KV cache on node 0.
(EngineCore pid=10720) INFO 11-23 16:54:06 [kv_cache_utils.py:2327] CPU KV cache size: 131,173 tokens, \
Maximum concurrency for 16,384 tokens per request: 8.01x
""".splitlines()

METRICS = (
    'vllm:cache_config_info{block_size="128",engine="0",kv_cache_max_concurrency="8.00625",'
    'kv_cache_memory_bytes="134217728",kv_cache_size_tokens="131174",num_gpu_blocks="1366"} 1.0\n'
)

# Pieces of the texts that reality.py, loading.py and out_of_memory.py wait for, and the files of vLLM that write them.
WRITTEN_BY = [
    ("v1/worker/gpu/model_runner.py", "Model loading took %s GiB memory and %.6f seconds"),
    ("v1/worker/gpu_model_runner.py", "Model loading took %s GiB memory and %.6f seconds"),
    ("v1/worker/gpu/model_runner.py", "Graph capturing finished in %.0f secs, took %.2f GiB"),
    ("v1/worker/gpu_worker.py", "Available KV cache memory: %s GiB"),
    ("v1/worker/gpu_worker.py", "CUDA graph pool memory: %s GiB (actual), %s GiB (estimated), "),
    ("v1/worker/gpu_worker.py", "CUDA graph memory profiling is enabled (default since "),
    ("v1/worker/gpu_worker.py", 'f"Free memory on device "'),
    ("v1/worker/gpu_worker.py", "GiB for consumed memory (weights + non-torch), "),
    ("v1/worker/gpu_worker.py", "for peak activation, and {format_gib(cuda_graph_memory_bytes)} "),
    ("v1/worker/gpu_worker.py", "GiB for CUDAGraph memory. Replace"),
    ("v1/worker/cpu_worker.py", 'f"Explicitly set ({format_gib(kv_cache_size)}/"'),
    ("v1/worker/cpu_worker.py", "is less than desired CPU memory utilization"),
    ("v1/worker/cpu_worker.py", "is less than requested memory for kv "),
    ("v1/worker/utils.py", "is less than desired GPU memory utilization "),
    ("v1/worker/utils.py", "is less than the engine's budget "),
    ("v1/core/kv_cache_utils.py", "%s KV cache size: %s tokens, "),
    ("v1/core/kv_cache_utils.py", "Maximum concurrency for %s tokens per request: %.2fx"),
    ("v1/core/kv_cache_utils.py", "which is larger than the available KV cache "),
    ("v1/core/kv_cache_utils.py", "No available memory for the cache blocks. "),
    ("v1/core/kv_cache_utils.py", "not enough GPU memory available "),
    ("utils/mem_utils.py", 'f"Total non KV cache memory: "'),
    ("utils/mem_utils.py", 'f"total consumed (from mem_get_info): "'),
    ("model_executor/model_loader/default_loader.py", "Loading weights took %.2f seconds"),
    ("model_executor/model_loader/weight_utils.py", "Loading safetensors checkpoint shards"),
    ("model_executor/model_loader/weight_utils.py", "{desc}: {percentage:3.0f}% Completed | {n_fmt}/{total_fmt} ["),
    ("v1/worker/gpu_model_runner.py", "Loading drafter model..."),
    ("v1/executor/multiproc_executor.py", "died unexpectedly"),
]


@pytest.mark.parametrize(("file", "text"), WRITTEN_BY)
def test_the_installed_vllm_writes_these_texts(file: str, text: str) -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    assert text in (Path(spec.origin).parent / file).read_text()


def test_a_gpu_start() -> None:
    assert read_reality(GPU_LOG) == Reality(
        weights_bytes=round(26.25 * GIB),  # the fullest rank
        load_seconds=310.25,
        kv_cache_bytes=round(1.5 * GIB),
        kv_cache_size_tokens=958698,
        kv_cache_max_concurrency=4.68,
        graph_bytes=round(0.44 * GIB),
        graph_estimate_bytes=round(0.5 * GIB),
        activation_bytes=round(1.67 * GIB) - round(0.5 * GIB),  # vLLM's peak holds the estimate for graphs
        non_torch_bytes=27 * GIB - round(26.25 * GIB),
        free_bytes=round(31.5 * GIB),
        total_bytes=round(31.86 * GIB),
    )


def test_without_the_estimate_the_peak_is_all_activation() -> None:
    lines = [line for line in GPU_LOG if "profiling is enabled" not in line]
    assert read_reality(lines).activation_bytes == round(1.67 * GIB)


def test_with_a_given_cache_only_the_debug_log_tells_the_peak() -> None:
    lines = [
        "(Worker_TP0 pid=8) INFO [m.py:1] Model loading took 26.0 GiB memory and 1.0 seconds",
        "(Worker_TP0 pid=8) DEBUG [gpu_worker.py:1] Memory profiling takes 3.00 seconds. Total non KV cache memory: "
        "28.5GiB; torch peak memory increase: 1.6GiB; total consumed (from mem_get_info): 27.25GiB; weights memory: 26",
    ]
    seen = read_reality(lines)
    assert seen.activation_bytes == round(1.25 * GIB) and seen.non_torch_bytes == round(1.25 * GIB)
    assert read_reality(lines[:1]).activation_bytes is None


def test_a_cpu_start_reports_no_sizes_of_the_model() -> None:
    seen = read_reality(CPU_LOG, METRICS)
    assert seen == Reality(
        load_seconds=pytest.approx(0.17),  # target and draft  # type: ignore[arg-type]
        kv_cache_bytes=134217728,  # exact in /metrics, rounded in the log
        num_gpu_blocks=1366,
        kv_cache_size_tokens=131174,
        kv_cache_max_concurrency=8.00625,
    )
    assert read_reality(CPU_LOG).kv_cache_bytes == round(0.12 * GIB)


def test_what_is_not_reported_is_absent() -> None:
    assert read_reality(["nothing of interest", ""], "vllm:num_requests_running 0.0\n") == Reality()
    none = 'vllm:cache_config_info{kv_cache_memory_bytes="None",num_gpu_blocks="None"} 1.0\n'
    assert read_reality([], none) == Reality()
    assert measured_figures(Reality()) == {} and compare({"weights": 1.0}, Reality()) == ()


def test_rows_hold_both_sides() -> None:
    planned = {"weights": 26.0 * GIB, "graphs": 0.0, "num_gpu_blocks": 100.0}
    rows = compare(planned, Reality(weights_bytes=27 * GIB, num_gpu_blocks=100, activation_bytes=5))
    assert [(row.item.name, row.difference, row.within_precision) for row in rows] == [
        ("weights", GIB, False),
        ("num_gpu_blocks", 0.0, True),
    ]
    near = compare({"weights": 26.005 * GIB}, Reality(weights_bytes=26 * GIB))[0]
    assert near.within_precision  # the log rounds to 0.01 GiB
    assert format_value(near.item, -1.5 * GIB, sign=True) == "-1.50 GiB"
    assert format_value(ITEMS[-1], 4.678, sign=True) == "+4.68"


def test_every_item_of_a_plan_is_comparable(bench: Bench) -> None:
    assert set(planned_figures(bench.plan)) == {item.name for item in ITEMS}


def test_metrics_of_both_sides_and_the_difference(bench: Bench) -> None:
    port = bench.free_port()
    exporter = Exporter(bench.status, "127.0.0.1", port)
    try:
        bench.status.compared(compare({"weights": 3.0, "kv_cache_size_tokens": 10.0}, read_reality(GPU_LOG)))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            text = response.read().decode()
    finally:
        exporter.close()
    weights = float(round(26.25 * GIB))
    for line in (
        'step128_planned_bytes{item="weights"} 3.0',
        f'step128_measured_bytes{{item="weights"}} {json.dumps(weights)}',
        f'step128_plan_difference_bytes{{item="weights"}} {json.dumps(weights - 3)}',
        "step128_planned_kv_cache_size_tokens 10.0",
        "step128_measured_kv_cache_size_tokens 958698.0",
        "step128_plan_difference_kv_cache_size_tokens 958688.0",
    ):
        found = [float(row.rpartition(" ")[2]) for row in text.splitlines() if row.startswith(line.rpartition(" ")[0])]
        assert found == [float(line.rpartition(" ")[2])], line
    assert 'item="graphs"' not in text  # measured, but not planned here: absent, never 0
