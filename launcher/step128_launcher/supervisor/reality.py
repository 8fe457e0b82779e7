"""What a finished start of vLLM 0.32 says about itself: its log and its /metrics -> Reality.

Every figure is None where vLLM did not report it, which depends on the device and the flags: a CPU worker reports no
weights, and a GPU worker its activation peak only where it divides the memory itself (no --kv-cache-memory-bytes).
Where several ranks report a size, the largest counts. The log rounds to 0.01 GiB. Sources of the texts, below vllm/:
v1/worker/gpu_worker.py, v1/worker/gpu/model_runner.py, v1/worker/gpu_model_runner.py, v1/worker/cpu_worker.py,
v1/core/kv_cache_utils.py, utils/mem_utils.py, model_executor/model_loader/default_loader.py.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from step128_launcher.supervisor.vllm_log import ANSI

LOG_PRECISION_BYTES = 2**30 // 100
_GIB = 2**30

_N = r"(-?\d+(?:\.\d+)?)"
_PROCESS = re.compile(r"^\((\w+)[^)]*?pid=(\d+)\)")
_MODEL_LOADING = re.compile(rf"Model loading took {_N} GiB memory and {_N} seconds")
_LOADING_WEIGHTS = re.compile(rf"Loading weights took {_N} seconds")
_AVAILABLE_KV = re.compile(rf"Available KV cache memory: {_N} GiB")
_SET_KV = re.compile(rf"(?:Explicitly|Auto) set \({_N}/{_N}\) GiB for KV cache")
_KV_SIZE = re.compile(rf"KV cache size: ([\d,]+) tokens, Maximum concurrency for [\d,]+ tokens per request: {_N}x")
_GRAPH_POOL = re.compile(rf"CUDA graph pool memory: {_N} GiB \(actual\), {_N} GiB \(estimated\)")
_GRAPH_CAPTURE = re.compile(rf"Graph capturing finished in {_N} secs, took {_N} GiB")
_ESTIMATE_APPLIED = "CUDA graph memory profiling is enabled"
_STARTUP = re.compile(
    rf"Free memory on device \({_N}/{_N} GiB\) on startup\. .*?Actual usage is {_N} GiB for consumed memory "
    rf"\(weights \+ non-torch\), {_N} GiB for peak activation, and {_N} GiB for CUDAGraph memory"
)
# With VLLM_LOGGING_LEVEL=DEBUG, also where the cache's size was given.
_PROFILE = re.compile(rf"Total non KV cache memory: {_N}GiB;.*?total consumed \(from mem_get_info\): {_N}GiB")
_CACHE_CONFIG = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Reality:
    """Sizes are bytes on one rank (the fullest), counts as vLLM counts them.

    `activation_bytes` is the peak beyond what stays allocated, without graphs; `non_torch_bytes` what is consumed
    besides weights (runtime context, RCCL, code objects, and torch's own caches); `free_bytes` and `total_bytes` are
    the device's before the start. `load_seconds` is the slowest rank's.
    """

    weights_bytes: int | None = None
    load_seconds: float | None = None
    kv_cache_bytes: int | None = None
    num_gpu_blocks: int | None = None
    kv_cache_size_tokens: int | None = None
    kv_cache_max_concurrency: float | None = None
    graph_bytes: int | None = None
    graph_estimate_bytes: int | None = None
    activation_bytes: int | None = None
    non_torch_bytes: int | None = None
    free_bytes: int | None = None
    total_bytes: int | None = None


def read_reality(log_lines: Iterable[str], metrics: str = "") -> Reality:
    """Return what the lines of one start, and the text of /metrics, report."""
    seen = _Seen()
    for line in log_lines:
        seen.read(ANSI.sub("", line))
    labels = _cache_labels(metrics)
    consumed, weights = seen.largest("consumed"), seen.largest("weights")
    return Reality(
        weights_bytes=weights,
        load_seconds=seen.load_seconds(),
        kv_cache_bytes=_integer(labels.get("kv_cache_memory_bytes")) or seen.largest("kv"),
        num_gpu_blocks=_integer(labels.get("num_gpu_blocks")),
        kv_cache_size_tokens=_integer(labels.get("kv_cache_size_tokens")) or seen.tokens,
        kv_cache_max_concurrency=_number(labels.get("kv_cache_max_concurrency")) or seen.concurrency,
        graph_bytes=seen.largest("graphs"),
        graph_estimate_bytes=seen.largest("graph estimate"),
        activation_bytes=seen.activation(),
        non_torch_bytes=None if consumed is None or weights is None else max(0, consumed - weights),
        free_bytes=seen.largest("free"),
        total_bytes=seen.largest("total"),
    )


class _Seen:
    """Collects the figures of the lines, each with the process that wrote it."""

    def __init__(self) -> None:
        self._sizes: dict[str, dict[str, int]] = {}
        self._loading: dict[str, float] = {}
        self._model_loading: dict[str, float] = {}
        self._estimate_applied = False
        self.tokens: int | None = None
        self.concurrency: float | None = None

    def read(self, line: str) -> None:
        prefix = _PROCESS.match(line)
        process = prefix[2] if prefix else ""
        if match := _MODEL_LOADING.search(line):
            self._keep("weights", process, match[1])
            self._model_loading[process] = float(match[2])
        elif match := _LOADING_WEIGHTS.search(line):  # once for the target, once for the draft
            self._loading[process] = self._loading.get(process, 0.0) + float(match[1])
        elif match := _AVAILABLE_KV.search(line) or _SET_KV.search(line):
            self._keep("kv", process, match[1])
        elif match := _KV_SIZE.search(line):
            self.tokens, self.concurrency = int(match[1].replace(",", "")), float(match[2])
        elif match := _GRAPH_POOL.search(line):
            self._keep("graphs", process, match[1])
            self._keep("graph estimate", process, match[2])
        elif match := _GRAPH_CAPTURE.search(line):
            self._keep("graphs", process, match[2])
        elif _ESTIMATE_APPLIED in line:
            self._estimate_applied = True
        elif match := _STARTUP.search(line):
            for name, text in zip(("free", "total", "consumed", "peak"), match.groups(), strict=False):
                self._keep(name, process, text)
        elif match := _PROFILE.search(line):
            self._keep("consumed", process, match[2])
            self._keep("headroom", process, f"{float(match[1]) - float(match[2])}")

    def largest(self, name: str) -> int | None:
        return max(self._sizes.get(name, {}).values(), default=None)

    def load_seconds(self) -> float | None:
        return max((self._model_loading or self._loading).values(), default=None)

    def activation(self) -> int | None:
        """Return the transient peak; vLLM's figure for it holds the estimate for graphs, where that is applied."""
        headroom, peak = self.largest("headroom"), self.largest("peak")
        if headroom is not None or peak is None:
            return headroom
        return max(0, peak - (self.largest("graph estimate") or 0 if self._estimate_applied else 0))

    def _keep(self, name: str, process: str, gib: str) -> None:
        self._sizes.setdefault(name, {})[process] = round(float(gib) * _GIB)


def _cache_labels(metrics: str) -> dict[str, str]:
    match = _CACHE_CONFIG.search(metrics)
    return dict(_LABEL.findall(match[1])) if match else {}


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:  # "None": not reported
        return None
