"""The issue-cost model: the shortest time in which a GPU could issue a counted launch.

Cycles of one SIMD by instruction, each wave issuing at most one instruction per cycle:

* vector ALU: 1, also ``v_dot2`` and ``v_dot4`` and a dual-issued pair (VALU per weight counts it as two); 4 for
  float64, for 32-bit integer products (``v_mul_lo``, ``v_mul_hi``, ``v_mad_u64``);
* WMMA: 16 for 16-bit, 8 for 8-bit and 4-bit operands on gfx1201; 32, 32 and 16 on gfx1151 (AMD's matrix instruction
  calculator; the same are in ROCm's origami). It cannot run beside the vector ALU, so both add up;
* transcendentals: one issue, and 4 cycles of their own unit;
* LDS: 128 bytes per cycle and vector memory 64 bytes per cycle (at least 1 cycle) of a compute unit, two SIMDs;
* scalar instructions are issued beside vector ones and have a unit of their own: 1 each, waits and hints none.

The units work in parallel, so a launch takes at least the time of the busiest one. With few waves the busiest SIMD
counts, not the average, and never less than one wave's own instructions one after the other.

Clocks and sizes: R9700 (gfx1201) 64 compute units, 2.92 GHz, 640 GB/s; Radeon 8060S (gfx1151) 40, 2.9 GHz, 256 GB/s.

Known error: one figure to hold it against, 248 GB/s, measured by others for vLLM's int4 experts on an RX 9070 XT (the
same 64 compute units; their group size and clock are not known). The model says 284 GB/s for that kernel with 64-bit
addresses, 313 with buffer instructions, 327 as vLLM 0.32 launches it with a group of 32: optimistic by 15 to 32 %. It
knows no latency, bank conflict or cache; expect 50-75 % of its bounds. llvm-mca is no alternative: it has wrong WMMA
latencies and sees one wave only.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from step128_kernels.errors import CountingError
from step128_kernels.offline.asm import Instruction
from step128_kernels.offline.count import LaunchCount
from step128_kernels.offline.occupancy import SIMDS_PER_WGP

WAVE_LANES = 32
_LDS_BYTES_PER_CYCLE = 128 / 2
_VMEM_BYTES_PER_CYCLE = 64 / 2
_TRANSCENDENTAL = re.compile(r"v_s?_?(exp|log|rcp|rsq|sqrt|sin|cos)_")
_QUARTER_RATE = re.compile(r"v_(\w+_f64|cvt_f64_\w+|mul_(lo|hi)_[ui]32|mad_(co_)?[ui]64_[ui]32)$")
_FREE_SCALAR = re.compile(r"s_(wait\w*|delay_alu|clause|nop|set_inst_prefetch_distance|code_end)$")
_WIDTH = re.compile(r"_(?:d16_)?(?:hi_)?([bui])(8|16|32|64|96|128|256|512)(?:_|$)")


@dataclass(frozen=True)
class Device:
    """What the model knows of one GPU."""

    name: str
    compute_units: int
    clock_hz: float
    memory_bytes_per_second: float
    wmma_cycles: dict[str, int]
    """Cycles of a SIMD by operand type."""

    @property
    def simds(self) -> int:
        """Two per compute unit."""
        return 2 * self.compute_units

    @property
    def wgps(self) -> int:
        """Work-group processors: two compute units each."""
        return self.compute_units // 2


DEVICES = {
    "gfx1201": Device(
        "Radeon AI PRO R9700", 64, 2.92e9, 640e9, {"f16": 16, "bf16": 16, "fp8": 8, "bf8": 8, "iu8": 8, "iu4": 8}
    ),
    "gfx1151": Device("Radeon 8060S", 40, 2.9e9, 256e9, {"f16": 32, "bf16": 32, "iu8": 32, "iu4": 16}),
}


@dataclass(frozen=True)
class Cycles:
    """Cycles of one SIMD by unit, and instructions."""

    valu: float = 0.0
    """Vector ALU and WMMA."""
    transcendental: float = 0.0
    lds: float = 0.0
    vmem: float = 0.0
    salu: float = 0.0
    alone: float = 0.0
    """What one wave needs with the GPU to itself: its instructions one after the other."""

    def plus(self, other: Cycles, times: int = 1) -> Cycles:
        """Add ``other``, repeated."""
        return Cycles(
            self.valu + other.valu * times,
            self.transcendental + other.transcendental * times,
            self.lds + other.lds * times,
            self.vmem + other.vmem * times,
            self.salu + other.salu * times,
            self.alone + other.alone * times,
        )


def access_bytes(instruction: Instruction) -> int:
    """Bytes that one lane loads or stores in memory or LDS; 0 if the instruction moves none."""
    match = _WIDTH.search(instruction.opcode)
    if match is None:
        return 4 if "permute" in instruction.opcode or "swizzle" in instruction.opcode else 0
    return int(match[2]) // 8 * (2 if "2addr" in instruction.opcode else 1)


def instruction_cycles(instruction: Instruction, device: Device) -> Cycles:
    """Cost of one instruction of one wave."""
    opcode = instruction.opcode
    if instruction.is_valu:
        if "wmma" in opcode:
            cycles = _wmma_cycles(opcode, device)
        elif any(_QUARTER_RATE.match(name) for name, _ in instruction.parts):
            cycles = 4
        else:
            cycles = 1
        slow = 4 if _TRANSCENDENTAL.match(opcode) else 0
        return Cycles(valu=cycles, transcendental=slow, alone=max(cycles, slow))
    if instruction.is_salu:
        issued = 0 if _FREE_SCALAR.match(opcode) else 1
        return Cycles(salu=issued, alone=issued)
    moved = WAVE_LANES * access_bytes(instruction)
    if opcode.startswith("ds_"):
        return Cycles(lds=max(1.0, moved / _LDS_BYTES_PER_CYCLE), alone=1)
    return Cycles(vmem=max(2.0, moved / _VMEM_BYTES_PER_CYCLE), alone=1)


def _wmma_cycles(opcode: str, device: Device) -> int:
    kind = opcode.rpartition("_")[2]
    if kind not in device.wmma_cycles:
        raise CountingError(f"no cycles are known for {opcode} on {device.name}; add them to offline/cost.py")
    return device.wmma_cycles[kind]


def launch_seconds(count: LaunchCount, num_warps: int, device: Device) -> float:
    """Shortest time in which ``device`` could issue a launch."""
    blocks = []
    for block in count.assembly.blocks:
        cost = Cycles()
        for instruction in block.instructions:
            cost = cost.plus(instruction_cycles(instruction, device))
        blocks.append(cost)
    total, longest = Cycles(), 0.0
    for counts, waves in count.classes:
        one = Cycles()
        for cost, times in zip(blocks, counts, strict=True):
            one = one.plus(cost, times)
        total = total.plus(one, waves)
        own = max(one.valu, one.transcendental, one.lds, one.vmem, one.salu) * _waves_of_busiest_simd(
            waves, num_warps, device
        )
        longest = max(longest, own, one.alone)
    shared = max(total.valu, total.transcendental, total.lds, total.vmem, total.salu) / device.simds
    return max(shared, longest) / device.clock_hz


def _waves_of_busiest_simd(waves: int, num_warps: int, device: Device) -> int:
    """Waves that some SIMD must run however they are spread; a work-group stays on one work-group processor."""
    if num_warps < SIMDS_PER_WGP:
        return math.ceil(waves / device.simds)
    return math.ceil(math.ceil(waves / num_warps) / device.wgps) * num_warps // SIMDS_PER_WGP


_KINDS = (
    ("wmma", r"v_s?wmma"),
    ("dot", r"v_dot"),
    ("perm", r"v_perm_b32"),
    ("lane exchange", r"v_(permlane|readlane|readfirstlane|writelane)|ds_(b?permute|swizzle)"),
    ("transcendental", r"v_s?_?(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    ("convert", r"v_cvt"),
    ("compare and select", r"v_(cmp|cndmask)"),
    ("move", r"v_(dual_)?mov"),
    ("other VALU", r"v_"),
    ("LDS load", r"ds_load"),
    ("LDS store", r"ds_"),
    ("memory load", r"(global|buffer|flat)_load"),
    ("scratch", r"scratch_"),
    ("memory store", r"(global|buffer|flat|tbuffer|image)_"),
    ("barrier", r"s_barrier"),
    ("wait", r"s_(wait|delay_alu|clause|nop)"),
    ("branch", r"s_c?branch"),
    ("scalar load", r"s_(buffer_)?load"),
    ("other scalar", r"s_"),
)


def instruction_kind(instruction: Instruction) -> str:
    """Group of an instruction in the mix that people read."""
    return next(name for name, pattern in _KINDS if re.match(pattern, instruction.opcode))


def instruction_mix(count: LaunchCount) -> Counter[str]:
    """Wave-instructions of a launch by kind."""
    mix: Counter[str] = Counter()
    for block, times in zip(count.assembly.blocks, count.blocks, strict=True):
        for instruction in block.instructions:
            mix[instruction_kind(instruction)] += times
    return +mix


def loaded_bytes(count: LaunchCount) -> dict[str, dict[int, int]]:
    """Bytes that all lanes of a launch load, by pointer argument and width in bits of one lane's load.

    Loads whose pointer could not be told are under "?". Lanes that load the same word count each.
    """
    found: dict[str, dict[int, int]] = {}
    times = count.blocks
    for i, block in enumerate(count.assembly.blocks):
        for j, instruction in enumerate(block.instructions):
            if not times[i] or not re.match(r"(global|buffer|flat)_load", instruction.opcode):
                continue
            size = access_bytes(instruction)
            by_width = found.setdefault(count.loaded_from.get((i, j), "?"), {})
            by_width[8 * size] = by_width.get(8 * size, 0) + WAVE_LANES * size * times[i]
    return found
