"""State of one wave as far as control flow can see it: scalar registers, a few vector registers, kernel arguments.

A value is an integer, or ``Unknown`` when it comes from memory or from vector arithmetic. Every value carries the
set of launch coordinates it was computed from, so that programs which cannot differ are run once.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from step128_kernels.errors import CountingError
from step128_kernels.launch import Launch
from step128_kernels.offline.asm import Assembly

FULL = 0xFFFFFFFF
X, Y, Z, WAVE = 1, 2, 4, 8
"""Coordinates that a value may depend on, as bits of a set."""

VCC, TTMP, NULL, M0, EXEC, SCC = 106, 108, 124, 125, 126, 128
_ARGUMENT_SEGMENT = 0xFE
_SEGMENT_SHIFT = 40  # each pointer argument gets its own 1 TiB of a 48-bit address space
_ELEMENT_BYTES = {"i64": 8, "fp64": 8, "i32": 4, "fp32": 4, "i16": 2, "fp16": 2, "bf16": 2}


@dataclass(frozen=True, eq=False)
class Unknown:
    """A 32-bit value that only the running GPU knows; ``key`` tells two of them apart, ``inverted`` complements it."""

    reason: str
    key: object
    inverted: bool = False


Value = int | Unknown


def unknown(reason: str) -> Unknown:
    """Make a value that equals no other."""
    return Unknown(reason, object())


def invert(value: Value) -> Value:
    """Complement all 32 bits."""
    if isinstance(value, Unknown):
        return Unknown(value.reason, value.key, not value.inverted)
    return value ^ FULL


def both(a: Value, b: Value) -> Value:
    """AND of two 32-bit values: lane masks are saved, complemented and joined again, and must come out full."""
    if isinstance(a, int) and isinstance(b, int):
        return a & b
    if a == 0 or b == 0:
        return 0
    if a == FULL:
        return b
    if b == FULL:
        return a
    if isinstance(a, Unknown) and isinstance(b, Unknown):
        if a.key is b.key:
            return a if a.inverted == b.inverted else 0
        return unknown(a.reason)
    return unknown(a.reason if isinstance(a, Unknown) else b.reason if isinstance(b, Unknown) else "")


def either(a: Value, b: Value) -> Value:
    """OR of two 32-bit values."""
    return invert(both(invert(a), invert(b)))


def differ(a: Value, b: Value) -> Value:
    """XOR of two 32-bit values."""
    for one, other in ((a, b), (b, a)):
        if one == 0:
            return other
        if one == FULL:
            return invert(other)
    if isinstance(a, Unknown) and isinstance(b, Unknown) and a.key is b.key:
        return 0 if a.inverted == b.inverted else FULL
    if isinstance(a, int) and isinstance(b, int):
        return a ^ b
    return unknown(a.reason if isinstance(a, Unknown) else b.reason if isinstance(b, Unknown) else "")


class Memory:
    """What scalar loads find: the kernel's arguments, and the contents given with the launch."""

    def __init__(self, launch: Launch, arguments: tuple[str, ...], assembly: Assembly) -> None:
        hidden = len(assembly.argument_offsets) - len(arguments)
        if hidden not in (0, 1, 2):
            raise CountingError(f"{assembly.name} has {len(assembly.argument_offsets)} arguments, not {arguments}")
        unused = set(launch.loads) - set(launch.pointers)
        if unused:
            raise CountingError(f"launch {launch.name} gives loads of {sorted(unused)}, which are not its pointers")
        self._launch = launch
        self._names: dict[int, str] = {}
        self._segment = bytearray(assembly.directives["kernarg_size"])
        for number, (name, offset) in enumerate(zip(arguments, assembly.argument_offsets, strict=False), 1):
            if name in launch.pointers:
                self._names[number] = name
                self._segment[offset : offset + 8] = (number << _SEGMENT_SHIFT).to_bytes(8, "little")
            else:
                content = _argument(launch.scalars[name])
                self._segment[offset : offset + len(content)] = content

    def pointer(self, address: int) -> str | None:
        """Name of the pointer argument that an address was made from."""
        return self._names.get(address >> _SEGMENT_SHIFT & 0xFF)

    def read(self, address: Value, size_bytes: int, where: int) -> tuple[list[Value], int]:
        """Load ``size_bytes`` (1, 2 or a multiple of 4) as 32-bit words, and what they depend on.

        ``where`` is what the address depends on.
        """
        words = max(1, size_bytes // 4)
        if isinstance(address, Unknown):
            return [unknown(f"a load at an address that depends on {address.reason}") for _ in range(words)], where
        offset = address & (1 << _SEGMENT_SHIFT) - 1
        if address >> _SEGMENT_SHIFT == _ARGUMENT_SEGMENT:
            content = bytes(self._segment[offset : offset + size_bytes]).ljust(size_bytes, b"\0")
            return _words(content), 0
        name = self.pointer(address)
        if name is None or name not in self._launch.loads:
            missing = f"a load from {name}" if name else "a load from an address of its own making"
            return [unknown(missing) for _ in range(words)], where
        hint = self._launch.loads[name]
        size = _ELEMENT_BYTES.get(self._launch.pointers[name].dtype, 1)
        return _words(bytes(self._byte(name, hint, offset + i, size) for i in range(size_bytes))), (
            0 if isinstance(hint, int) else where
        )

    @staticmethod
    def _byte(name: str, hint: int | tuple[int, ...], offset: int, size: int) -> int:
        if isinstance(hint, int):
            return hint >> 8 * (offset % size) & 0xFF
        if offset // size >= len(hint):
            raise CountingError(f"element {offset // size} of {name} is loaded; {len(hint)} are given in Launch.loads")
        return hint[offset // size] >> 8 * (offset % size) & 0xFF


def _argument(value: int | float) -> bytes:
    """A run-time argument as Triton passes it: float32, or the narrowest of int32, int64 and uint64 that holds it."""
    if isinstance(value, float):
        return struct.pack("<f", value)
    size_bytes = 4 if -(1 << 31) <= value < 1 << 31 else 8
    return (value & (1 << 8 * size_bytes) - 1).to_bytes(size_bytes, "little")


def _words(content: bytes) -> list[Value]:
    return [int.from_bytes(content[i : i + 4], "little") for i in range(0, len(content), 4)]


class Wave:
    """Registers of one wave at one moment."""

    def __init__(self) -> None:
        self.values: list[Value] = [unknown("a register that was never written")] * 132
        self.depends: list[int] = [0] * 132
        self.vectors: dict[int, tuple[Value, int, bool]] = {}
        """Vector registers that matter: value of the first lane, what it depends on, whether all lanes have it."""
        self.lanes: dict[tuple[int, int], tuple[Value, int]] = {}
        """Scalar registers spilled to one lane of a vector register."""
        self.values[NULL], self.values[EXEC], self.values[EXEC + 1], self.values[SCC] = 0, FULL, 0, 0

    def forget(self, vector: int, reason: str) -> None:
        """Overwrite a vector register with something that is not followed."""
        self.vectors[vector] = (unknown(reason), 0, False)
        if self.lanes:
            self.lanes = {place: value for place, value in self.lanes.items() if place[0] != vector}


def start_wave(
    assembly: Assembly, arch: str, program: tuple[int, int, int], wave: int, extents: Mapping[int, int]
) -> Wave:
    """Registers as the dispatcher sets them (LLVM, "User Guide for AMDGPU Backend", initial kernel execution state).

    ``extents`` gives the size of each coordinate; one of size 1 is a constant that nothing depends on.
    """
    state = Wave()
    varying = {axis: axis if size > 1 else 0 for axis, size in extents.items()}

    def put(index: int, value: int, depends: int) -> None:
        state.values[index], state.depends[index] = value, depends

    def is_set(name: str) -> int:
        return assembly.directives.get(name, 0)

    sizes = {"dispatch_ptr": 2, "queue_ptr": 2, "kernarg_segment_ptr": 2, "dispatch_id": 2, "private_segment_size": 1}
    index = 0
    for name, size in sizes.items():
        if is_set(f"user_sgpr_{name}"):
            if name == "kernarg_segment_ptr":
                address = _ARGUMENT_SEGMENT << _SEGMENT_SHIFT
                put(index, address & FULL, 0)
                put(index + 1, address >> 32, 0)
            index += size
    if is_set("user_sgpr_count") != index:
        raise CountingError(f"{assembly.name} takes {is_set('user_sgpr_count')} user registers, not {index}")
    x, y, z = program
    if arch.startswith("gfx12"):
        put(TTMP + 9, x, varying[X])
        put(TTMP + 7, y | z << 16, varying[Y] | varying[Z])
        put(TTMP + 8, wave << 25, varying[WAVE])
    else:
        for name, value, axis in (("x", x, X), ("y", y, Y), ("z", z, Z)):
            if is_set(f"system_sgpr_workgroup_id_{name}"):
                put(index, value, varying[axis])
                index += 1
    state.vectors[0] = (wave * 32, varying[WAVE], False)
    return state
