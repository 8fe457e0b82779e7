"""Run the AMD inline assembly of a Triton kernel in numpy, and ask the real assembler whether it takes it.

`AsmBlock(text, constraints)` takes what `tl.inline_asm_elementwise` takes, and refuses what the hardware or the
assembler would: see AsmError's messages. What each opcode does is in `isa_opcodes`.

Registers are allocated adversarially. LLVM may give an output without early clobber ("=v") the register of any input,
and of the input tied to it ("0") always. So an input read by a later instruction than the one that wrote such an output
is an error, whatever the data (LLVM LangRef, "Inline Assembler Expressions", on early clobber).

Operands are $n, integers (32-bit; 0..64 and -1..-16 are inline constants, others literals), and the float constants
0.5, 1.0, 2.0, 4.0 and their negatives. An instruction reads at most one literal, and at most two scalar values with it
(LLVM's constant bus limit since gfx10: the assembler refuses more).
"""

import re
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from isa_assembler import assembles
from isa_floats import AsmError, Words, dot2_bounds
from isa_opcodes import OPCODES, Modifiers, Opcode

__all__ = ["OPCODES", "AsmBlock", "AsmError", "assembles", "dot2_bounds"]

_INLINE_FLOATS = {f"{sign}{value}": float(f"{sign}{value}") for sign in ("", "-") for value in (0.5, 1.0, 2.0, 4.0)}
_MODIFIER = re.compile(
    r"(?<=\s)(?:(op_sel|op_sel_hi|neg_lo|neg_hi):\[([01](?:,[01])*)\]|(byte_sel):([0-3])|(clamp))(?=\s|$)"
)


@dataclass(frozen=True)
class Operand:
    """A register of the block ($index; half 0 for .l, 1 for .h) or, with index None, a constant."""

    index: int | None
    half: int | None = None
    integer: int = 0
    number: float | None = None

    @property
    def is_literal(self) -> bool:
        return self.index is None and self.number is None and not -16 <= self.signed <= 64

    @property
    def signed(self) -> int:
        return self.integer - (self.integer >> 31 << 32)

    def word(self, kind: str) -> np.uint32:
        """A constant's 32 bits; a float is a float16 in the low half for `kind` "f16"."""
        if self.number is None:
            return np.uint32(self.integer)
        return np.uint32(int.from_bytes(struct.pack("<e" if kind == "f16" else "<f", self.number), "little"))


@dataclass(frozen=True)
class Instruction:
    """One parsed line."""

    line: str
    name: str
    opcode: Opcode
    destination: Operand
    sources: tuple[Operand, ...]
    modifiers: Modifiers

    @property
    def written_half(self) -> int | None:
        if self.opcode.destination != "half":
            return None
        return self.destination.half if self.destination.half is not None else (self.modifiers.op_sel or (0,))[-1]


@dataclass
class _Register:
    value: npt.NDArray[Any]
    written: int = 0  # bit 0: low half, bit 1: high half


def _operand(text: str, line: str) -> Operand:
    if match := re.fullmatch(r"\$(\d+)(?:\.([lh]))?", text):
        return Operand(int(match[1]), {"l": 0, "h": 1, None: None}[match[2]])
    if text in _INLINE_FLOATS:
        return Operand(None, number=_INLINE_FLOATS[text])
    if re.fullmatch(r"-?\d+|0[xX][0-9a-fA-F]+", text) and -(2**31) <= (value := int(text, 0)) < 2**32:
        return Operand(None, integer=value % 2**32)
    raise AsmError(f"unknown operand or modifier {text!r} in {line!r}")


def _check_half(operand: Operand, allowed: bool, needed: bool, line: str) -> None:
    if operand.half is not None and not allowed:
        raise AsmError(f"this operand has no .l or .h: {line!r}")
    if operand.half is None and needed:
        raise AsmError(f"a 16-bit operand must say $n.l or $n.h (Triton assembles with real-true16): {line!r}")


def _check_constants(i: Instruction) -> None:
    """Which sources of this opcode may be constants, and how they must be selected."""
    kind, m = i.opcode.constants, i.modifiers
    for n, source in enumerate(i.sources):
        if source.index is not None:
            continue
        if kind == "none" or (kind == "last" and n != 2):
            raise AsmError(f"source {n} must be a register: a constant's halves are not defined here: {i.line!r}")
        if kind in ("f16", "u16"):
            if not i.modifiers.op_sel_hi or m.op_sel_hi[n] or (m.op_sel and m.op_sel[n]):
                raise AsmError(f"a constant in a packed instruction needs op_sel_hi 0 at source {n} (7.7): {i.line!r}")
            if kind == "u16" and source.number is not None:
                raise AsmError(f"a float constant in an integer instruction: {i.line!r}")
        if kind == "mix" and m.op_sel_hi and m.op_sel_hi[n]:
            raise AsmError(f"source {n} is a constant and must be read as float32 (op_sel_hi 0): {i.line!r}")


def _parse(line: str) -> Instruction:
    if ";" in line or "//" in line:
        raise AsmError(f"';' starts a comment in AMD assembly (the rest is dropped); use a new line: {line!r}")
    name, rest = line.split(maxsplit=1) if " " in line else (line, "")
    name = re.sub(r"_e(32|64)$", "", name)
    if name not in OPCODES:
        raise AsmError(f"opcode {name!r} is not modelled; add it to isa_opcodes.py with its section")
    opcode = OPCODES[name]
    found: dict[str, Any] = {}
    for vector, bits, byte, number, clamp in _MODIFIER.findall(rest):
        key = vector or byte or clamp
        if key in found or key not in opcode.modifiers.split():
            raise AsmError(f"{key} twice, or not a modifier of {name}: {line!r}")
        found[key] = tuple(map(int, bits.split(","))) if vector else int(number) if byte else True
    operands = [_operand(part.strip(), line) for part in _MODIFIER.sub("", rest).split(",")]
    if len(operands) != opcode.sources + 1:
        raise AsmError(f"{name} has {opcode.sources} sources: {line!r}")
    length = opcode.sources + (opcode.destination != "word")  # the last op_sel bit of a conversion is the destination's
    if any(isinstance(value, tuple) and len(value) != length for value in found.values()):
        raise AsmError(f"a modifier of {name} needs {length} bits: {line!r}")
    destination, *sources = operands
    instruction = Instruction(line, name, opcode, destination, tuple(sources), Modifiers(**found))
    if destination.index is None:
        raise AsmError(f"the destination is a constant: {line!r}")
    _check_half(destination, opcode.destination == "half", opcode.needs_half and opcode.destination == "half", line)
    for n, source in enumerate(sources):
        is_half = n in opcode.half_sources
        _check_half(source, is_half, opcode.needs_half and is_half, line)
    if "op_sel" in found and any(operand.half is not None for operand in operands):
        raise AsmError(f"op_sel and .l or .h together: {line!r}")
    _check_constants(instruction)
    return instruction


@dataclass
class AsmBlock:
    """The assembly text of one block and its LLVM constraints, as tl.inline_asm_elementwise takes them."""

    text: str
    constraints: str
    program: list[Instruction] = field(init=False)
    outputs: list[str] = field(init=False)
    inputs: list[str] = field(init=False)
    tied: dict[int, int] = field(init=False)  # operand number of a tied input -> its output

    def __post_init__(self) -> None:
        parts = [part.strip() for part in self.constraints.split(",")]
        self.outputs = [part for part in parts if part.startswith("=")]
        self.inputs = parts[len(self.outputs) :]
        if not set(self.outputs) <= {"=v", "=&v"} or not all(re.fullmatch(r"v|s|\d+", part) for part in self.inputs):
            raise AsmError(f"constraints are =v or =&v, then v, s or an output's number: {self.constraints!r}")
        first = len(self.outputs)
        self.tied = {first + n: int(part) for n, part in enumerate(self.inputs) if part.isdigit()}
        if not all(output < first for output in self.tied.values()) or len(set(self.tied.values())) < len(self.tied):
            raise AsmError(f"an input is tied to no output, or two to one: {self.constraints!r}")
        self.program = [_parse(line.strip()) for line in self.text.split("\n") if line.strip()]
        for instruction in self.program:
            self._check_operands(instruction)

    def _check_operands(self, i: Instruction) -> None:
        numbers = [o.index for o in (i.destination, *i.sources) if o.index is not None]
        if max(numbers) >= len(self.outputs) + len(self.inputs):
            raise AsmError(f"more operands than constraints ({self.constraints!r}): {i.line!r}")
        if self._register(numbers[0]) >= len(self.outputs):
            raise AsmError(f"writes an input: {i.line!r}")
        pairs = {p.destination.index for p in self.program if p.opcode.destination == "pair"}
        if pairs & set(numbers) and (i.opcode.destination != "pair" or pairs & set(numbers[1:])):
            raise AsmError(f"a 64-bit output used as a 32-bit operand: {i.line!r}")
        literals = {o.integer for o in i.sources if o.is_literal}
        scalars = {o.index for o in i.sources if o.index is not None and self._is_scalar(o.index)}
        if len(literals) > 1 or len(literals) + len(scalars) > 2:
            raise AsmError(f"one literal, and two scalar values with it, is the limit: {i.line!r}")

    def _register(self, number: int) -> int:
        return self.tied.get(number, number)

    def _is_scalar(self, number: int) -> bool:
        return number >= len(self.outputs) and self.inputs[number - len(self.outputs)] == "s"

    def run(self, *inputs: Words) -> tuple[npt.NDArray[Any], ...]:
        """Evaluate on uint32 arrays (floats as their bits), one per input constraint, of shapes that broadcast.

        Returns one array per output: uint32, or uint64 for a register pair. Raises AsmError for a missing early clobber
        and for a register (or half of one) that is read or returned before it was written.
        """
        if len(inputs) != len(self.inputs) or any(array.dtype != np.uint32 for array in inputs):
            raise AsmError(f"{len(self.inputs)} uint32 arrays expected for {self.constraints!r}")
        shape = np.broadcast_shapes((1,), *(array.shape for array in inputs))
        values = [np.broadcast_to(array, shape) for array in inputs]
        first = len(self.outputs)
        registers = {self._register(first + n): _Register(value, 3) for n, value in enumerate(values)}
        self._check_sharing({first + n: value for n, value in enumerate(values)})
        for i in self.program:
            words = [self._read(registers, source, i) for source in i.sources]
            result = i.opcode.evaluate([np.broadcast_to(word, shape) for word in words], i.modifiers)
            number = self._register(i.destination.index or 0)
            if (half := i.written_half) is None:
                registers[number] = _Register(result, 3)
            else:
                old = registers.get(number, _Register(np.zeros_like(result)))
                kept = old.value & np.uint32(0xFFFF << 16 * (1 - half))
                registers[number] = _Register(kept | result << np.uint32(16 * half), old.written | 1 << half)
        missing = [n for n in range(first) if n not in registers or registers[n].written != 3]
        if missing:
            raise AsmError(f"outputs {missing} are not (wholly) written")
        return tuple(registers[n].value for n in range(first))

    def _read(self, registers: dict[int, _Register], source: Operand, i: Instruction) -> Words:
        if source.index is None:
            return np.asarray(source.word(i.opcode.constants))
        register = registers.get(self._register(source.index), _Register(np.zeros(1, np.uint32)))
        if register.written | {None: 0, 0: 2, 1: 1}[source.half] != 3:
            raise AsmError(f"${source.index} is read before it is written: {i.line!r}")
        return register.value >> np.uint32(16 * (source.half or 0))

    def _check_sharing(self, inputs: dict[int, npt.NDArray[Any]]) -> None:
        """Raise if an input is read after an output that may have taken its register was written."""
        owner = {output: number for number, output in self.tied.items()}
        written: list[int] = []
        for i in self.program:
            for number in (o.index for o in i.sources if o.index is not None):
                if number < len(self.outputs) or number in self.tied or self._is_scalar(number):
                    continue
                for output in written:
                    # A tied output sits in its own input's register: another input is there only if its value is.
                    same = output not in owner or np.array_equal(inputs[owner[output]], inputs[number])
                    if self.outputs[output] == "=v" and same:
                        raise AsmError(
                            f"${output} needs =&v: it may be in ${number}'s register, read later: {i.line!r}"
                        )
            written.append(self._register(i.destination.index or 0))
