"""Scalar instructions as functions that change a wave's state."""

from __future__ import annotations

import re
from collections.abc import Callable

from step128_kernels.errors import CountingError
from step128_kernels.offline.asm import Block, Instruction
from step128_kernels.offline.floats import SCALAR_FLOATS
from step128_kernels.offline.machine import (
    EXEC,
    FULL,
    NULL,
    SCC,
    Memory,
    Unknown,
    Value,
    Wave,
    both,
    differ,
    either,
    invert,
    unknown,
)
from step128_kernels.offline.operands import (
    LOAD_BYTES,
    Step,
    literal,
    read_operand,
    registers_of,
    scalar_index,
    scalar_register,
    write_scalar,
    written,
)
from step128_kernels.offline.salu import NO_EFFECT, NOT_MODELLED, SCALAR_OPS, ScalarOp, signed
from step128_kernels.offline.vectors import load_step, vector_steps

_LOGIC: dict[str, Callable[[Value, Value], Value]] = {
    "s_and_b32": both,
    "s_or_b32": either,
    "s_xor_b32": differ,
    "s_andn2_b32": lambda a, b: both(a, invert(b)),
    "s_and_not1_b32": lambda a, b: both(a, invert(b)),
    "s_orn2_b32": lambda a, b: either(a, invert(b)),
    "s_or_not1_b32": lambda a, b: either(a, invert(b)),
}
_SAVE_EXEC: dict[str, Callable[[Value, Value], Value]] = {
    "s_and_saveexec_b32": both,
    "s_or_saveexec_b32": either,
    "s_xor_saveexec_b32": differ,
    "s_and_not0_saveexec_b32": lambda source, lanes: both(invert(source), lanes),
    "s_and_not1_saveexec_b32": lambda source, lanes: both(source, invert(lanes)),
}


def block_steps(
    number: int, block: Block, memory: Memory, wanted: set[int], loaded_from: dict[tuple[int, int], set[str]]
) -> list[Step]:
    """Turn a block into steps, leaving out what control flow cannot notice.

    Raises:
        CountingError: a scalar instruction is not in the tables.
    """
    steps: list[Step] = []
    for position, instruction in enumerate(block.instructions):
        if instruction.is_salu:
            step = _scalar_step(instruction, memory)
            if step is not None:
                steps.append(step)
        elif re.match(r"(buffer|global)_load_", instruction.opcode):
            steps.append(load_step(instruction, memory, wanted, loaded_from.setdefault((number, position), set())))
        else:
            for opcode, operands in instruction.parts:
                steps += vector_steps(opcode, operands, wanted)
    return steps


def _scalar_step(instruction: Instruction, memory: Memory) -> Step | None:
    opcode, operands = instruction.opcode, instruction.operands
    if NO_EFFECT.match(opcode) or instruction.is_branch or opcode == "s_endpgm":
        return None
    if re.match(r"s_(buffer_)?load_", opcode):
        return _scalar_load(opcode, operands, memory)
    if opcode in _SAVE_EXEC:
        return _save_exec(opcode, operands)
    if opcode.startswith("s_cselect_b"):
        return _select(operands, int(opcode[-2:]))
    if opcode in _LOGIC:
        return _logic(opcode, operands)
    if opcode in SCALAR_FLOATS:
        return _arithmetic(SCALAR_FLOATS[opcode], operands)
    if NOT_MODELLED.match(opcode):
        return _unknown_result(opcode, operands)
    if opcode not in SCALAR_OPS:
        raise CountingError(f"scalar instruction {opcode} is unknown ({instruction.text}); add it to offline/salu.py")
    return _arithmetic(SCALAR_OPS[opcode], operands)


def _arithmetic(op: ScalarOp, operands: tuple[str, ...]) -> Step:
    target = scalar_index(operands[0]) if op.destination_bits else NULL
    given = operands if op.reads_destination or not op.destination_bits else operands[1:]
    if target is None or len(given) != len(op.source_bits):
        raise CountingError(f"operands {', '.join(operands)} do not fit the instruction")
    sources = [read_operand(operand, bits) for operand, bits in zip(given, op.source_bits, strict=True)]
    if op.reads_scc:
        sources.append(read_operand("scc", 32))
    compute, bits = op.compute, op.destination_bits

    def step(wave: Wave) -> None:
        values: list[int] = []
        depends = 0
        reason: str | None = None
        for source in sources:
            value, more = source(wave)
            depends |= more
            if isinstance(value, Unknown):
                reason = value.reason
            else:
                values.append(value)
        if reason is None:
            result, scc = compute(*values)
            write_scalar(wave, target, bits, result, depends)
            if scc is not None:
                wave.values[SCC], wave.depends[SCC] = scc, depends
        else:
            write_scalar(wave, target, bits, unknown(reason), depends)
            if writes_scc:
                wave.values[SCC], wave.depends[SCC] = unknown(reason), depends

    # Whether SCC is written never depends on the values, so one evaluation tells.
    writes_scc = compute(*([1] * len(sources)))[1] is not None
    reads = frozenset[int]().union(
        *(registers_of(operand, size) for operand, size in zip(given, op.source_bits, strict=True))
    )
    writes = written(target, bits // 32) | (written(SCC) if writes_scc else frozenset())
    return Step(step, reads | (written(SCC) if op.reads_scc else frozenset()), writes)


def _select(operands: tuple[str, ...], bits: int) -> Step:
    """``s_cselect``: the source that is not chosen may be unknown."""
    target = scalar_register(operands[0])
    sources = read_operand(operands[2], bits), read_operand(operands[1], bits)

    def step(wave: Wave) -> None:
        condition, also = wave.values[SCC], wave.depends[SCC]
        value, depends = (condition, 0) if isinstance(condition, Unknown) else sources[condition](wave)
        write_scalar(wave, target, bits, value, depends | also)

    reads = registers_of(operands[1], bits) | registers_of(operands[2], bits) | written(SCC)
    return Step(step, reads, written(target, bits // 32))


def _logic(opcode: str, operands: tuple[str, ...]) -> Step:
    target, compute = scalar_register(operands[0]), _LOGIC[opcode]
    first, second = read_operand(operands[1], 32), read_operand(operands[2], 32)

    def step(wave: Wave) -> None:
        a, from_a = first(wave)
        b, from_b = second(wave)
        value = compute(a, b)
        write_scalar(wave, target, 32, value, from_a | from_b)
        wave.values[SCC] = int(value != 0) if isinstance(value, int) else unknown(value.reason)
        wave.depends[SCC] = from_a | from_b

    return Step(step, registers_of(operands[1]) | registers_of(operands[2]), written(target, 1, SCC))


def _save_exec(opcode: str, operands: tuple[str, ...]) -> Step:
    target, source, compute = scalar_register(operands[0]), read_operand(operands[1], 32), _SAVE_EXEC[opcode]

    def step(wave: Wave) -> None:
        value, depends = source(wave)
        lanes, also = wave.values[EXEC], wave.depends[EXEC]
        result = compute(value, lanes)
        write_scalar(wave, target, 32, lanes, also)
        write_scalar(wave, EXEC, 32, result, depends | also)
        wave.values[SCC] = int(result != 0) if isinstance(result, int) else unknown(result.reason)
        wave.depends[SCC] = depends | also

    return Step(step, registers_of(operands[1]) | written(EXEC), written(target, 1, EXEC, SCC))


def _unknown_result(opcode: str, operands: tuple[str, ...]) -> Step:
    target = SCC if opcode.startswith("s_cmp") else scalar_register(operands[0])
    reason = f"the result of {opcode}"
    return Step(lambda wave: write_scalar(wave, target, 32, unknown(reason), 0), frozenset(), written(target))


def _scalar_load(opcode: str, operands: tuple[str, ...], memory: Memory) -> Step:
    target, base = scalar_register(operands[0]), read_operand(operands[1], 64)
    size_bytes = LOAD_BYTES[opcode.rpartition("_")[2]]
    is_buffer, is_signed = opcode.startswith("s_buffer"), opcode[-2] == "i" or opcode.endswith("i16")
    offset_text, *modifiers = operands[2].split()
    offset = read_operand(offset_text, 32)
    extra = next((literal(text[7:], 32) for text in modifiers if text.startswith("offset:")), 0)

    def step(wave: Wave) -> None:
        address, from_base = base(wave)
        more, from_more = offset(wave)
        where: Value
        if isinstance(address, Unknown) or isinstance(more, Unknown):
            where = address if isinstance(address, Unknown) else more
        else:
            where = (address & 0xFFFFFFFFFFFF if is_buffer else address) + signed(more) + signed(extra)
        words, depends = memory.read(where, size_bytes, from_base | from_more)
        for i, word in enumerate(words):
            if is_signed and isinstance(word, int):
                word = signed(word, 8 * size_bytes) & FULL
            write_scalar(wave, target + i, 32, word, depends)

    reads = registers_of(operands[1], 64) | registers_of(offset_text)
    return Step(step, reads, written(target, max(1, size_bytes // 4)))
