"""The few float instructions that integer division by a run-time number compiles to, on 32-bit patterns.

LLVM estimates the quotient with a reciprocal and then corrects it with integers, so the quotient is exact for any
reciprocal within one unit in the last place; here it is the nearest float.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

from step128_kernels.offline.salu import Result, ScalarOp, signed


def as_float(bits: int) -> float:
    """Read a 32-bit pattern as a float."""
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def as_bits(value: float) -> int:
    """Round to the nearest float and return its pattern; beyond the largest one it is infinite."""
    try:
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    except OverflowError:
        return as_bits(math.copysign(math.inf, value))


def _reciprocal(bits: int) -> int:
    value = as_float(bits)
    return as_bits(1 / value if value else math.copysign(math.inf, value))


def _to_integer(bits: int, low: int, high: int) -> int:
    value = as_float(bits)
    if math.isnan(value):
        return 0
    return high if value >= high else low if value <= low else math.trunc(value)


def _multiply(a: int, b: int) -> int:
    return as_bits(as_float(a) * as_float(b))


_ONE: dict[str, Callable[[int], int]] = {
    "cvt_f32_u32": lambda a: as_bits(float(a)),
    "cvt_f32_i32": lambda a: as_bits(float(signed(a))),
    "cvt_u32_f32": lambda a: _to_integer(a, 0, 0xFFFFFFFF),
    "cvt_i32_f32": lambda a: _to_integer(a, -(1 << 31), (1 << 31) - 1) & 0xFFFFFFFF,
}


def _exact(compute: Callable[..., int]) -> Callable[..., Result]:
    return lambda *sources: (compute(*sources), None)


SCALAR_FLOATS = {f"s_{name}": ScalarOp(_exact(compute), (32,), 32) for name, compute in _ONE.items()} | {
    "s_mul_f32": ScalarOp(_exact(_multiply), (32, 32), 32)
}
"""Scalar float opcodes that are computed; the others have unknown results."""

VECTOR_FLOATS: dict[str, Callable[..., int]] = {f"v_{name}": compute for name, compute in _ONE.items()} | {
    "v_rcp_f32": _reciprocal,
    "v_rcp_iflag_f32": _reciprocal,
    "v_s_rcp_f32": _reciprocal,
    "v_mul_f32": _multiply,
}
"""Vector float opcodes that are computed for values that become scalar again."""
