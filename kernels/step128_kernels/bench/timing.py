"""How long a call takes on the GPU, with nothing of it in any cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from step128_kernels.bench.measure import Timing

METHOD = (
    "median of single calls, each replayed as a graph between two events of the GPU's own clock; "
    "caches overwritten before each"
)

_FLUSH_BYTES = 256 << 20  # four times the largest cache (64 MiB on an R9700, 50 MB on an H200)
_LARGEST_COPY_BYTES = 1 << 30
_MOST_CALLS, _FEWEST_CALLS = 100, 10
_TIMED_SECONDS = 0.5


def time_call(call: Callable[[], Any]) -> Timing:
    """Time a call as vLLM runs it in decode: captured once as a graph, so that launching costs the host nothing.

    Raises:
        RuntimeError: the call cannot be captured, because it waits for the host.
    """
    call()  # compiles, and fills tables that are made once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    first = _replays(graph, flush, _FEWEST_CALLS)
    more = min(_MOST_CALLS, max(_FEWEST_CALLS, int(_TIMED_SECONDS / max(sorted(first)[len(first) // 2], 1e-7))))
    return summary(_replays(graph, flush, more))


def _replays(graph: Any, flush: torch.Tensor, calls: int) -> list[float]:
    event: Any = torch.cuda.Event  # torch does not type its constructor
    events = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(calls)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def summary(seconds: list[float]) -> Timing:
    """Median, and the bounds of the middle 60 %."""
    ranked = sorted(seconds)
    count = len(ranked)
    return Timing(ranked[count // 2], ranked[count // 5], ranked[count - 1 - count // 5], count)


def time_copy() -> tuple[int, Timing]:
    """Copy device memory to device memory; the first number counts what is read and what is written."""
    free, _ = torch.cuda.mem_get_info()
    size = min(_LARGEST_COPY_BYTES, free // 8)
    source = torch.empty(size, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return 2 * size, time_call(lambda: target.copy_(source))
