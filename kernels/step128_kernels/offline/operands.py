"""Operands of instructions: registers by number, constants by value, and how a wave's state is read and written."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from step128_kernels.errors import CountingError
from step128_kernels.offline.machine import EXEC, FULL, M0, NULL, SCC, TTMP, VCC, Unknown, Value, Wave, unknown

VECTOR_BASE = 256
"""Vector registers are numbered from here where they stand beside scalar ones."""


@dataclass(frozen=True)
class Step:
    """An instruction as a change of a wave's state."""

    run: Callable[[Wave], None]
    reads: frozenset[int]
    """Registers that the change depends on."""
    writes: frozenset[int]
    replaces: bool = True
    """Whether nothing of what was in the written registers remains."""


Source = Callable[[Wave], tuple[Value, int]]
"""An operand as its value, and what that depends on."""

LOAD_BYTES = {"u8": 1, "i8": 1, "u16": 2, "i16": 2, "b32": 4, "b64": 8, "b96": 12, "b128": 16, "b256": 32, "b512": 64}
"""Size of a load by the last part of its name."""

_NAMED = {
    "vcc": VCC,
    "vcc_lo": VCC,
    "vcc_hi": VCC + 1,
    "null": NULL,
    "m0": M0,
    "exec": EXEC,
    "exec_lo": EXEC,
    "exec_hi": EXEC + 1,
    "scc": SCC,
    "src_scc": SCC,
}


def scalar_index(operand: str) -> int | None:
    """Number of a scalar register operand (its first register if it is a range), or ``None`` if it is not one."""
    if operand in _NAMED:
        return _NAMED[operand]
    match = re.fullmatch(r"(s|ttmp)(?:(\d+)|\[(\d+):\d+\])", operand)
    if match is None:
        return None
    return int(match[2] or match[3]) + (TTMP if match[1] == "ttmp" else 0)


def vector_indices(operand: str) -> range:
    """Numbers of the vector registers of an operand; empty if it is not one."""
    match = re.match(r"[-|]*v(?:(\d+)|\[(\d+):(\d+)\])", operand)
    if match is None:
        return range(0)
    first = int(match[1] or match[2])
    return range(first, int(match[3] or first) + 1)


def literal(operand: str, bits: int) -> int:
    """Value of a constant operand as an unsigned integer of ``bits``.

    Raises:
        CountingError: the operand is neither an integer nor a float constant.
    """
    try:
        return int(operand, 0) & ((1 << bits) - 1)
    except ValueError:
        pass
    try:
        number = float(operand)
    except ValueError as error:
        raise CountingError(f"operand {operand!r} is not understood") from error
    return int.from_bytes(struct.pack("<f" if bits == 32 else "<d", number), "little")


def read_operand(operand: str, bits: int) -> Source:
    """Read an operand: a scalar register, a pair of them, or a constant."""
    index = scalar_index(operand)
    if index is None:
        constant = literal(operand, bits)
        return lambda wave: (constant, 0)
    if bits == 32:
        return lambda wave: (wave.values[index], wave.depends[index])

    def pair(wave: Wave) -> tuple[Value, int]:
        low, high = wave.values[index], wave.values[index + 1]
        depends = wave.depends[index] | wave.depends[index + 1]
        if isinstance(low, Unknown):
            return low, depends
        if isinstance(high, Unknown):
            return high, depends
        return low | high << 32, depends

    return pair


def read_vector(operand: str) -> Callable[[Wave], tuple[Value, int, bool]]:
    """Read what vector instructions do: the first lane's value, what it depends on, and whether all lanes have it."""
    registers = vector_indices(operand)
    if registers:
        missing = (unknown("vector arithmetic"), 0, False)
        if not re.fullmatch(r"v\d+|v\[\d+:\d+\]", operand):
            return lambda wave: missing
        return lambda wave: wave.vectors.get(registers[0], missing)
    try:
        source = read_operand(operand, 32)
    except CountingError:
        return lambda wave: (unknown("vector arithmetic"), 0, False)
    return lambda wave: (*source(wave), True)


def registers_of(operand: str, bits: int = 32) -> frozenset[int]:
    """Registers that an operand reads, vector registers from ``VECTOR_BASE``."""
    index = scalar_index(operand)
    if index is not None:
        return frozenset(range(index, index + bits // 32))
    return vector_registers(vector_indices(operand))


def vector_registers(indices: Iterable[int]) -> frozenset[int]:
    """Vector registers as they are numbered beside scalar ones."""
    return frozenset(VECTOR_BASE + index for index in indices)


def written(index: int, count: int = 1, *more: int) -> frozenset[int]:
    """Scalar registers that a step writes: ``count`` from ``index``, unless that is null, and ``more``."""
    return frozenset(more) | (frozenset() if index == NULL else frozenset(range(index, index + count)))


def write_scalar(wave: Wave, index: int, bits: int, value: Value, depends: int) -> None:
    """Write a scalar register or a pair of them."""
    if index == NULL or bits == 0:
        return
    if bits == 32:
        wave.values[index], wave.depends[index] = value, depends
        return
    wave.values[index] = value & FULL if isinstance(value, int) else unknown(value.reason)
    wave.values[index + 1] = value >> 32 if isinstance(value, int) else unknown(value.reason)
    wave.depends[index] = wave.depends[index + 1] = depends


def scalar_register(operand: str) -> int:
    """Number of a scalar register operand.

    Raises:
        CountingError: it is something else.
    """
    index = scalar_index(operand)
    if index is None:
        raise CountingError(f"operand {operand!r} is not a scalar register")
    return index
