"""Small Triton kernels whose work is known by arithmetic, and launches of them."""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from step128_kernels.launch import KernelCase, Launch, Pointer

ARCHES = ("gfx1201", "gfx1151")
BLOCK = 128


@triton.jit
def add_tile(x_ptr, index, BLOCK: tl.constexpr):
    return tl.load(x_ptr + index * BLOCK + tl.arange(0, BLOCK))


@triton.jit
def fixed_loop(x_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(N):
        total += add_tile(x_ptr, i, BLOCK)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


@triton.jit
def counted_loop(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(n):
        total += add_tile(x_ptr, i, BLOCK)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


@triton.jit
def tail_loop(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    lane = tl.arange(0, BLOCK)
    for start in range(0, size, BLOCK):
        total += tl.load(x_ptr + start + lane, mask=start + lane < size, other=0.0)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + lane, total)


@triton.jit
def triangle(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(n):
        for j in range(i):
            total += add_tile(x_ptr, i * n + j, BLOCK)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


@triton.jit
def by_program(x_ptr, out_ptr, columns, limit, BLOCK: tl.constexpr):
    """Program (x, y, z) loads (x // columns) + y + z tiles; those at or beyond the limit load nothing."""
    program = tl.program_id(0)
    if program >= limit:
        return
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(program // columns + tl.program_id(1) + tl.program_id(2)):
        total += add_tile(x_ptr, i, BLOCK)
    tl.store(out_ptr + program * BLOCK + tl.arange(0, BLOCK), total)


@triton.jit
def by_memory(x_ptr, count_ptr, out_ptr, BLOCK: tl.constexpr):
    """Each program loads as many tiles as its element of ``count_ptr`` says."""
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(count_ptr + program)):
        total += add_tile(x_ptr, i, BLOCK)
    tl.store(out_ptr + program * BLOCK + tl.arange(0, BLOCK), total)


@triton.jit
def either_way(x_ptr, flag_ptr, out_ptr, BLOCK: tl.constexpr):
    """One tile, or four more."""
    total = add_tile(x_ptr, 0, BLOCK)
    if tl.load(flag_ptr) > 0:
        for i in tl.static_range(1, 5):
            total += add_tile(x_ptr, i, BLOCK)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


@triton.jit
def softmax(x_ptr, out_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row)
    shifted = tl.exp(x - tl.max(x))
    tl.store(out_ptr + row, shifted / tl.sum(shifted))


@triton.jit
def product(a_ptr, b_ptr, out_ptr, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows, columns, inner = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        a = tl.load(a_ptr + rows[:, None] * K + start + inner[None, :])
        b = tl.load(b_ptr + columns[None, :] * K + start + inner[:, None])
        total = tl.dot(a, b, total)
    tl.store(out_ptr + rows[:, None] * BN + columns[None, :], total)


def launch(
    function: Any,
    scalars: Mapping[str, int] | None = None,
    constants: Mapping[str, Any] | None = None,
    *,
    grid: tuple[int, int, int] = (1, 1, 1),
    num_warps: int = 1,
    loads: Mapping[str, int | tuple[int, ...]] | None = None,
    size_bytes: int = 1 << 20,
    dtypes: Mapping[str, str] | None = None,
    waves_per_eu: int = 0,
) -> Launch:
    """A launch of one of the kernels above: every ``…_ptr`` argument is fp32 unless said, ``BLOCK`` is 128."""
    types = {"count_ptr": "i32", "flag_ptr": "i32"} | dict(dtypes or {})
    pointers = {
        name: Pointer(types.get(name, "fp32"), size_bytes) for name in function.arg_names if name.endswith("_ptr")
    }
    constants = dict(constants or {})
    if "BLOCK" in function.arg_names:
        constants.setdefault("BLOCK", BLOCK)
    return Launch(
        name=function.__name__,
        function=function,
        pointers=pointers,
        scalars=dict(scalars or {}),
        constants=constants,
        grid=grid,
        num_warps=num_warps,
        loads=dict(loads or {}),
        waves_per_eu=waves_per_eu,
    )


def case(
    *launches: Launch, arch: str = "gfx1201", kernel: str = "toy", weights: int = 1, memory_bytes: int = 1
) -> KernelCase:
    return KernelCase(kernel, "decode", arch, {"M": 1}, {"BLOCK": BLOCK}, launches, weights, memory_bytes)
