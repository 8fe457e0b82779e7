"""Comparisons of vectors: their outcome where every lane compares the same known integers, else unknown."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

from step128_kernels.offline.machine import EXEC, FULL, Wave, unknown
from step128_kernels.offline.operands import Step, read_vector, registers_of, write_scalar, written
from step128_kernels.offline.salu import signed

_RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "lt": operator.lt,
    "le": operator.le,
    "eq": operator.eq,
    "ne": operator.ne,
    "ge": operator.ge,
    "gt": operator.gt,
}
_INTEGERS = re.compile(r"v_cmp_(lt|le|eq|ne|ge|gt)_([iu])32$")


def followed(opcode: str) -> bool:
    """Whether an instruction is a comparison whose operands are worth following."""
    return _INTEGERS.match(opcode) is not None


def compare_step(opcode: str, target: int, operands: tuple[str, ...]) -> Step:
    """A mask of lanes in scalar register ``target``.

    LLVM keeps a scalar in a vector register where the vector unit computed it (``v_max3_i32`` of loop bounds); a branch
    on it is then a comparison of vectors in which all lanes agree.
    """
    match = _INTEGERS.match(opcode)
    if match is None or len(operands) != 3:
        return unknown_mask(target)
    relation, is_signed = _RELATIONS[match[1]], match[2] == "i"
    first, second = read_vector(operands[1]), read_vector(operands[2])

    def step(wave: Wave) -> None:
        (a, from_a, every_a), (b, from_b, every_b) = first(wave), second(wave)
        if not (isinstance(a, int) and isinstance(b, int) and every_a and every_b and wave.values[EXEC] == FULL):
            write_scalar(wave, target, 32, unknown("a comparison of vectors"), 0)
            return
        holds = relation(signed(a), signed(b)) if is_signed else relation(a, b)
        write_scalar(wave, target, 32, FULL if holds else 0, from_a | from_b | wave.depends[EXEC])

    return Step(step, registers_of(operands[1]) | registers_of(operands[2]) | written(EXEC), written(target))


def unknown_mask(target: int, reads: frozenset[int] = frozenset()) -> Step:
    """A mask that is not followed: some lanes of those it depends on."""

    def step(wave: Wave) -> None:
        depends = 0
        for index in reads:
            depends |= wave.depends[index]
        write_scalar(wave, target, 32, unknown("a comparison of vectors"), depends)

    return Step(step, reads, written(target))
