"""Vector instructions as far as a scalar register can notice them: comparisons, lane reads, and loads of one word."""

from __future__ import annotations

import re
from collections.abc import Callable

from step128_kernels.offline.asm import Assembly, Instruction
from step128_kernels.offline.compares import compare_step, followed, unknown_mask
from step128_kernels.offline.floats import VECTOR_FLOATS
from step128_kernels.offline.machine import EXEC, FULL, Memory, Unknown, Wave, unknown
from step128_kernels.offline.operands import (
    LOAD_BYTES,
    Step,
    literal,
    read_operand,
    read_vector,
    registers_of,
    scalar_index,
    scalar_register,
    vector_indices,
    vector_registers,
    write_scalar,
    written,
)
from step128_kernels.offline.salu import signed

# Arithmetic on addresses of loads whose result becomes scalar, and on work-item numbers, which hold the wave's number.
_VECTOR: dict[str, Callable[..., int]] = {
    "v_mov_b32": lambda a: a,
    "v_and_b32": lambda a, b: a & b,
    "v_or_b32": lambda a, b: a | b,
    "v_lshlrev_b32": lambda a, b: b << (a & 31),
    "v_lshrrev_b32": lambda a, b: b >> (a & 31),
    "v_ashrrev_i32": lambda a, b: signed(b) >> (a & 31),
    "v_add_nc_u32": lambda a, b: a + b,
    "v_sub_nc_u32": lambda a, b: a - b,
    "v_bfe_u32": lambda a, b, c: a >> (b & 31) & ((1 << (c & 31)) - 1),
    "v_lshl_add_u32": lambda a, b, c: (a << (b & 31)) + c,
    "v_mul_lo_u32": lambda a, b: a * b,
    "v_min_i32": lambda *of: min(map(signed, of)),
    "v_max_i32": lambda *of: max(map(signed, of)),
    "v_min3_i32": lambda *of: min(map(signed, of)),
    "v_max3_i32": lambda *of: max(map(signed, of)),
    "v_min_u32": min,
    "v_max_u32": max,
    "v_min3_u32": min,
    "v_max3_u32": max,
    **VECTOR_FLOATS,
}
_SECOND_DESTINATION = re.compile(r"v_(\w+_co_\w+|div_scale_\w+|mad_[ui]64_[ui]32)$")


def wanted_vectors(assembly: Assembly) -> set[int]:
    """Vector registers whose value can reach a scalar register, as far as it is followed at all."""
    flows: list[tuple[set[int], set[int]]] = []
    wanted: set[int] = set()
    for block in assembly.blocks:
        for instruction in block.instructions:
            for opcode, operands in instruction.parts:
                if opcode in ("v_readfirstlane_b32", "v_readlane_b32"):
                    wanted.update(vector_indices(operands[1]))
                elif followed(opcode):
                    wanted.update(index for operand in operands[1:] for index in vector_indices(operand))
                elif opcode in _VECTOR or re.match(r"(buffer|global)_load_", opcode):
                    sources = {index for operand in operands[1:] for index in vector_indices(operand)}
                    flows.append((set(vector_indices(operands[0])), sources))
    while True:
        more = {index for targets, sources in flows if targets & wanted for index in sources} - wanted
        if not more:
            return wanted
        wanted |= more


def vector_steps(opcode: str, operands: tuple[str, ...], wanted: set[int]) -> list[Step]:
    """Steps of a vector instruction that writes a scalar register or a vector register that matters."""
    steps: list[Step] = []
    if opcode == "v_readfirstlane_b32":
        return [_read_lane(scalar_register(operands[0]), operands[1], None)]
    if opcode == "v_readlane_b32":
        return [_read_lane(scalar_register(operands[0]), operands[1], operands[2])]
    if opcode == "v_writelane_b32":
        return [_write_lane(operands)]
    if opcode.startswith("v_cmpx"):
        return [unknown_mask(EXEC, written(EXEC))]
    if not operands:
        return steps
    destinations = operands[:2] if _SECOND_DESTINATION.match(opcode) or opcode.startswith("v_swap") else operands[:1]
    for operand in destinations:
        index = scalar_index(operand)
        if index is not None and opcode.startswith("v_s_"):
            steps.append(_pseudo_scalar(opcode, index, operands[1:]))
        elif index is not None and opcode.startswith("v_"):
            steps.append(compare_step(opcode, index, operands))
    touched = [index for operand in destinations for index in vector_indices(operand) if index in wanted]
    is_store = "_store_" in opcode
    if touched and not is_store:
        steps.append(_vector_arithmetic(opcode, operands, touched))
    return steps


def _vector_arithmetic(opcode: str, operands: tuple[str, ...], touched: list[int]) -> Step:
    compute = _VECTOR.get(opcode)
    plain = compute is not None and not any(re.search(r"[:|\s.]", operand) for operand in operands)
    sources = [read_vector(operand) for operand in operands[1:]] if plain else []

    def step(wave: Wave) -> None:
        found = [source(wave) for source in sources]
        for index in touched:
            wave.forget(index, "vector arithmetic")
        values = [value for value, _, _ in found if isinstance(value, int)]
        if compute is None or not plain or wave.values[EXEC] != FULL or len(values) < len(found):
            return
        depends = 0
        for _, more, _ in found:
            depends |= more
        wave.vectors[touched[0]] = (compute(*values) & FULL, depends, all(same for _, _, same in found))

    reads = frozenset[int]().union(*(registers_of(operand) for operand in operands[1:] if plain))
    return Step(step, reads | written(EXEC), vector_registers(touched))


def _pseudo_scalar(opcode: str, target: int, operands: tuple[str, ...]) -> Step:
    """A transcendental on scalar registers, which gfx12 gives to the vector unit."""
    if opcode not in VECTOR_FLOATS:
        reason = f"the result of {opcode}"
        return Step(lambda wave: write_scalar(wave, target, 32, unknown(reason), 0), frozenset(), written(target))
    compute, source = VECTOR_FLOATS[opcode], read_operand(operands[0], 32)

    def step(wave: Wave) -> None:
        value, depends = source(wave)
        write_scalar(wave, target, 32, compute(value) if isinstance(value, int) else value, depends)

    return Step(step, registers_of(operands[0]), written(target))


def _read_lane(target: int, operand: str, lane: str | None) -> Step:
    source = read_vector(operand)
    register = vector_indices(operand)
    number = literal(lane, 32) if lane is not None and scalar_index(lane) is None else None

    def step(wave: Wave) -> None:
        if number is not None and (register[0], number) in wave.lanes:
            value, depends = wave.lanes[register[0], number]
        else:
            value, depends, uniform = source(wave)
            first = lane is None and wave.values[EXEC] == FULL
            if not uniform and not first:
                value = unknown("one lane of a vector")
        write_scalar(wave, target, 32, value, depends)

    return Step(step, registers_of(operand) | written(EXEC), written(target))


def _write_lane(operands: tuple[str, ...]) -> Step:
    register, source = vector_indices(operands[0])[0], read_operand(operands[1], 32)
    lane = literal(operands[2], 32)

    def step(wave: Wave) -> None:
        wave.lanes[register, lane] = source(wave)

    return Step(step, registers_of(operands[1]), registers_of(operands[0]), replaces=False)


def load_step(instruction: Instruction, memory: Memory, wanted: set[int], seen: set[str]) -> Step:
    """Note which pointer a vector load reads, and follow its value if every lane loads the same known word."""
    is_buffer = instruction.opcode.startswith("buffer")
    base_operand = instruction.operands[2].split()[0]
    base_index = scalar_index(base_operand) or 0
    base = read_operand(base_operand, 64) if scalar_index(base_operand) is not None else None
    address = instruction.operands[1]
    offset = (lambda wave: (0, 0, True)) if address == "off" and is_buffer else read_vector(address)
    extra = re.search(r"offset:(-?\w+)", instruction.text)
    constant = int(extra[1], 0) if extra else 0
    scalar_text = instruction.operands[3].split()[0] if is_buffer else "0"
    scalar_offset = read_operand(scalar_text, 32)
    targets = [index for index in vector_indices(instruction.operands[0]) if index in wanted]
    width = instruction.opcode.rpartition("_")[2]
    size_bytes = LOAD_BYTES.get(width, 0)
    whole = bool(targets) and size_bytes >= 4 and targets[0] == vector_indices(instruction.operands[0])[0]

    def step(wave: Wave) -> None:
        shift, from_shift, uniform = offset(wave)
        for index in targets:
            wave.forget(index, "a load of vectors")
        if base is None:
            return
        where, from_base = base(wave)
        if isinstance(where, Unknown):
            return
        where &= 0xFFFFFFFFFFFF
        name = memory.pointer(where)
        if name is not None:
            seen.add(name)
        more, from_more = scalar_offset(wave)
        if not whole or not uniform or wave.values[EXEC] != FULL:
            return
        if isinstance(shift, int) and isinstance(more, int):
            distance = (shift if is_buffer else signed(shift)) + more + constant
            depends = from_base | from_shift | from_more
            records = wave.values[base_index + 2] if is_buffer else distance + 1
            if isinstance(records, int) and distance >= records:  # a masked load, which finds zero
                wave.vectors[targets[0]] = (0, depends, True)
            else:
                words, depends = memory.read(where + distance, 4, depends)
                wave.vectors[targets[0]] = (words[0], depends, True)

    reads = registers_of(base_operand, 128 if is_buffer else 64) | registers_of(address) | registers_of(scalar_text)
    return Step(step, reads | written(EXEC), vector_registers(targets))
