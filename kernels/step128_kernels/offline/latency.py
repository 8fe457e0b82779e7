"""How long the waves of a counted launch wait for memory: what the issue-cost model leaves out, for ranking configs.

A wave that needs what it loaded waits for it; meanwhile others run, if there are others. Little's law then gives the
time: rounds of waiting, times the latency, over the waves that are resident. A launch of few waves that each go to
memory often is slow however few instructions it has.

All of this is assumed, and the same for both GPUs: 600 ns from DRAM under load; 150 ns from a cache, for pointers whose
bytes the launch loads at least four times over (activations, which every work-group reads), but never for weights; a
wait for loads is taken to be a wait for all of them; loads still under way where a basic block ends are forgotten
(loops that LLVM or Triton pipelined so wait less here than they do); scalar loads, LDS and the start of a launch cost
nothing.
"""

from __future__ import annotations

import math
import re

from step128_kernels.launch import Launch
from step128_kernels.offline.asm import Block
from step128_kernels.offline.cost import Device, loaded_bytes
from step128_kernels.offline.count import LaunchCount

MEMORY_LATENCY_SECONDS = 600e-9
CACHE_LATENCY_SECONDS = 150e-9
_CACHED_REUSE = 4
_WEIGHTS = frozenset({"tiles_ptr", "scales_ptr", "b_ptr", "b_scale_ptr"})  # ours, and those of vLLM's kernels

_LOAD = re.compile(r"(global|buffer|flat)_load")
_WAIT = re.compile(r"s_wait_loadcnt|s_wait_loadcnt_dscnt|s_waitcnt$")


def block_waiting_seconds(number: int, block: Block, count: LaunchCount, cached: frozenset[str]) -> float:
    """Time that one run of a block waits for loads issued since the wait before; a later wait for the same loads costs
    nothing more, since they come one behind the other.
    """
    seconds, pending = 0.0, 0.0
    for place, instruction in enumerate(block.instructions):
        if _LOAD.match(instruction.opcode):
            is_cached = count.loaded_from.get((number, place)) in cached
            pending = max(pending, CACHE_LATENCY_SECONDS if is_cached else MEMORY_LATENCY_SECONDS)
        elif pending and _WAIT.match(instruction.opcode) and _waits_for_loads(instruction.text):
            seconds, pending = seconds + pending, 0.0
    return seconds


def cached_pointers(launch: Launch, count: LaunchCount) -> frozenset[str]:
    """Pointers whose bytes are loaded several times over, weights excepted."""
    return frozenset(
        name
        for name, widths in loaded_bytes(count).items()
        if name in launch.pointers.keys() - _WEIGHTS
        and sum(widths.values()) >= _CACHED_REUSE * launch.pointers[name].size_bytes
    )


def _waits_for_loads(text: str) -> bool:
    """On gfx11 one instruction waits for LDS too, and names the counters it means."""
    return "s_waitcnt" not in text or "vmcnt" in text


def waiting_seconds(launch: Launch, count: LaunchCount, waves_per_simd: float, device: Device) -> float:
    """Time that a launch waits for memory.

    Args:
        launch: what is launched.
        count: its work.
        waves_per_simd: how many of its waves a SIMD holds.
        device: the GPU.
    """
    cached = cached_pointers(launch, count)
    in_block = [block_waiting_seconds(n, block, count, cached) for n, block in enumerate(count.assembly.blocks)]
    total = longest = 0.0
    for counts, waves in count.classes:
        seconds = sum(times * each for times, each in zip(counts, in_block, strict=True))
        total += seconds * waves
        longest = max(longest, seconds)
    return max(longest, total / max(1.0, waves_per_simd * device.simds))


def ranking_seconds(issuing: float, waiting: float, moving: float) -> float:
    """One figure from three that overlap: none can be hidden wholly behind the largest, hence the root of squares.

    It ranks configs; it is no prediction of a time.
    """
    return math.hypot(issuing, waiting, moving)
