"""AMD assembly as LLVM prints it, parsed to basic blocks of instructions and the code object's metadata."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from step128_kernels.errors import CountingError

_INSTRUCTION = re.compile(r"(s|v|ds|global|buffer|flat|scratch|image|tbuffer)_\w+$")
_SUFFIX = re.compile(r"_(e32|e64|e64_dpp|e64_dpp8|dpp8|dpp)$")
_BRANCHES = ("s_branch", "s_cbranch_")
_ENDS = ("s_endpgm",)


@dataclass(frozen=True)
class Instruction:
    """One machine instruction. A dual-issued pair (``v_dual_… :: v_dual_…``) is one."""

    opcode: str
    """Mnemonic without the encoding suffix (``_e32``, ``_e64``, ``_dpp``)."""
    operands: tuple[str, ...]
    """Comma-separated operands; modifiers stay with the last one."""
    text: str

    @cached_property
    def parts(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Opcode and operands of each half of a dual-issued pair, named as single instructions; else of itself."""
        halves = [half.strip().partition(" ") for half in self.text.split("::")]
        return tuple((_plain_name(name.replace("v_dual_", "v_")), _operands(rest)) for name, _, rest in halves)

    @property
    def is_valu(self) -> bool:
        """Whether it is issued to the vector ALU (WMMA included)."""
        return self.opcode.startswith("v_")

    @property
    def is_salu(self) -> bool:
        """Whether it is scalar: arithmetic, scalar load, branch, wait, barrier."""
        return self.opcode.startswith("s_")

    @property
    def is_branch(self) -> bool:
        """Whether it may continue elsewhere than at the next instruction."""
        return self.opcode.startswith(_BRANCHES)


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other; only the last one may branch."""

    label: str
    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]
    """Numbers of the blocks that may follow: the branch target first, then the next block. Empty at the end."""


@dataclass(frozen=True)
class Assembly:
    """One kernel's code and metadata."""

    name: str
    blocks: tuple[Block, ...]
    directives: dict[str, int]
    """``.amdhsa_…`` values of the kernel descriptor, without the prefix."""
    metadata: dict[str, int]
    """Integers of the code object metadata, such as "vgpr_count" and "sgpr_spill_count"."""
    argument_offsets: tuple[int, ...]
    """Byte offset of each kernel argument, Triton's two hidden scratch pointers last."""


def parse_assembly(text: str) -> Assembly:
    """Parse what Triton returns as ``asm["amdgcn"]``.

    Raises:
        CountingError: a line of code is not understood, or the kernel calls functions.
    """
    name = _required(r"^\s*\.amdhsa_kernel\s+(\S+)", text)
    lines = text.split("\n")
    begin = next((i for i, line in enumerate(lines) if re.match(rf"{re.escape(name)}:", line)), None)
    if begin is None:
        raise CountingError(f"no code of kernel {name} in the assembly")
    chunks = _split(lines[begin + 1 :], name)
    directives = {key: int(value) for key, value in re.findall(r"^\s*\.amdhsa_(\w+)\s+(\d+)\s*$", text, re.MULTILINE)}
    notes = text[text.rindex(".amdgpu_metadata\n---") :]
    metadata = {key: int(value) for key, value in re.findall(r"^    \.(\w+):\s+(\d+)\s*$", notes, re.MULTILINE)}
    offsets = tuple(int(value) for value in re.findall(r"^\s+(?:- )?\.offset:\s+(\d+)\s*$", notes, re.MULTILINE))
    return Assembly(name, _link(chunks), directives, metadata, offsets)


def _required(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise CountingError(f"this is not AMD assembly of a kernel: no line matches {pattern}")
    return match.group(1)


def _split(lines: list[str], name: str) -> list[tuple[str, list[Instruction]]]:
    """Cut the function's lines at labels and after branches."""
    chunks: list[tuple[str, list[Instruction]]] = [(name, [])]
    for line in lines:
        code = line.split(";", 1)[0].split("//", 1)[0].strip()
        if code.startswith(".Lfunc_end"):
            return chunks
        label = re.fullmatch(r"([\w.$]+):", code)
        if label is not None:
            if label.group(1).startswith(".LBB"):
                chunks.append((label.group(1), []))
            continue
        if not code or code.startswith("."):
            continue
        instruction = _instruction(code)
        chunks[-1][1].append(instruction)
        if instruction.is_branch or instruction.opcode in _ENDS:
            chunks.append(("", []))
    raise CountingError(f"the code of kernel {name} has no end")


def _instruction(code: str) -> Instruction:
    opcode, _, rest = code.partition(" ")
    if not _INSTRUCTION.match(opcode):
        raise CountingError(f"this line of assembly is not understood: {code}")
    return Instruction(_plain_name(opcode), _operands(rest), code)


def _plain_name(opcode: str) -> str:
    return _SUFFIX.sub("", opcode)


def _operands(rest: str) -> tuple[str, ...]:
    """Cut at the commas outside brackets."""
    return tuple(part.strip() for part in re.split(r",(?![^\[]*\])", rest) if part.strip())


def _link(chunks: list[tuple[str, list[Instruction]]]) -> tuple[Block, ...]:
    """Find every block's successors."""
    chunks = [chunk for i, chunk in enumerate(chunks) if chunk[0] or chunk[1] or i == 0]
    numbers = {label: i for i, (label, _) in enumerate(chunks) if label}
    blocks = []
    for i, (label, instructions) in enumerate(chunks):
        last = instructions[-1] if instructions else None
        following = (i + 1,) if i + 1 < len(chunks) else ()
        if last is None:
            successors: tuple[int, ...] = following
        elif last.opcode in _ENDS:
            successors = ()
        elif last.is_branch:
            target = numbers.get(last.operands[0])
            if target is None:
                raise CountingError(f"branch to an unknown label: {last.text}")
            successors = (target,) if last.opcode == "s_branch" else (target, *following)
        else:
            successors = following
        blocks.append(Block(label or f"after {chunks[i - 1][0] or i - 1}", tuple(instructions), successors))
    return tuple(blocks)
