"""Exact trip counts: the scalar control flow of one wave, executed on real kernel arguments and program numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from step128_kernels.errors import CountingError
from step128_kernels.launch import Launch
from step128_kernels.offline.asm import Assembly, Instruction
from step128_kernels.offline.liveness import deciding_steps
from step128_kernels.offline.machine import EXEC, SCC, VCC, Memory, Unknown, Value, start_wave
from step128_kernels.offline.steps import block_steps
from step128_kernels.offline.vectors import wanted_vectors

MOST_BLOCKS = 20_000_000
"""A wave that runs more blocks than this is taken to be caught in a loop."""

_CONDITIONS = {
    "s_cbranch_scc0": (SCC, False),
    "s_cbranch_scc1": (SCC, True),
    "s_cbranch_vccz": (VCC, False),
    "s_cbranch_vccnz": (VCC, True),
    "s_cbranch_execz": (EXEC, False),
    "s_cbranch_execnz": (EXEC, True),
}


class UndecidedError(Exception):
    """Control flow depends on something unknown at a branch for which no decision was given."""

    def __init__(self, block: int) -> None:
        super().__init__(block)
        self.block = block


@dataclass
class Trace:
    """What one wave did."""

    counts: list[int]
    """How often each block ran."""
    depends: int = 0
    """Launch coordinates that some branch depended on."""
    assumed: dict[int, str] = field(default_factory=dict)
    """Blocks whose branch was decided without knowing, with the reason."""


class WaveRunner:
    """Runs single waves of one compiled launch."""

    def __init__(self, assembly: Assembly, arch: str, launch: Launch, arguments: tuple[str, ...]) -> None:
        self.assembly = assembly
        self.loaded_from: dict[tuple[int, int], set[str]] = {}
        """Pointer arguments that each vector load (block, instruction) was seen to read."""
        self._arch = arch
        self._extents = dict(zip((1, 2, 4, 8), (*launch.grid, launch.num_warps), strict=True))
        memory = Memory(launch, arguments, assembly)
        wanted = wanted_vectors(assembly)
        steps = [
            block_steps(number, block, memory, wanted, self.loaded_from) for number, block in enumerate(assembly.blocks)
        ]
        self._decide = [_decision(block.instructions[-1:]) for block in assembly.blocks]
        tested = [frozenset({decision[0]}) if decision else frozenset[int]() for decision in self._decide]
        self._all = [[step.run for step in block] for block in steps]
        self._deciding = [
            [step.run for step in block]
            for block in deciding_steps(steps, [block.successors for block in assembly.blocks], tested)
        ]
        self._exits = _loop_exits(assembly)

    def run(
        self, program: tuple[int, int, int], wave: int, decisions: Mapping[int, bool], *, addresses: bool = False
    ) -> Trace:
        """Run one wave. ``decisions`` says for blocks whether their branch is taken when its condition is unknown.

        With ``addresses``, what no branch depends on is computed too, and ``loaded_from`` is filled.

        Raises:
            UndecidedError: a branch on an unknown condition has no decision.
            CountingError: a loop's end is unknown, or never comes.
        """
        state = start_wave(self.assembly, self._arch, program, wave, self._extents)
        blocks, decide = self.assembly.blocks, self._decide
        steps = self._all if addresses else self._deciding
        trace = Trace([0] * len(blocks))
        counts = trace.counts
        number = 0
        for _ in range(MOST_BLOCKS):
            counts[number] += 1
            for step in steps[number]:
                step(state)
            successors = blocks[number].successors
            if not successors:
                return trace
            condition = decide[number]
            if condition is None:
                number = successors[0]
                continue
            register, wanted = condition
            value: Value = state.values[register]
            trace.depends |= state.depends[register]
            if isinstance(value, Unknown):
                taken = self._assume(number, value, decisions, trace)
            else:
                taken = (value != 0) == wanted
            number = successors[0] if taken else successors[1]
        raise CountingError(f"{self.assembly.name}: program {program} does not end after {MOST_BLOCKS} blocks")

    def _assume(self, number: int, value: Unknown, decisions: Mapping[int, bool], trace: Trace) -> bool:
        block = self.assembly.blocks[number]
        branch = block.instructions[-1]
        if number in self._exits:
            raise CountingError(
                f"{self.assembly.name}: the end of the loop at {self._exits[number]} depends on {value.reason} "
                f"({branch.text}), so its iterations cannot be counted. Give what is loaded in Launch.loads."
            )
        trace.assumed[number] = value.reason
        if branch.opcode == "s_cbranch_execz":  # only skips code that no lane would run
            return False
        if number not in decisions:
            raise UndecidedError(number)
        return decisions[number]


def _decision(last: tuple[Instruction, ...]) -> tuple[int, bool] | None:
    """Register that a block's branch tests and whether it is taken on non-zero; ``None`` if there is no choice."""
    if not last or not last[0].opcode.startswith("s_cbranch"):
        return None
    if last[0].opcode not in _CONDITIONS:
        raise CountingError(f"this branch is not understood: {last[0].text}")
    return _CONDITIONS[last[0].opcode]


def _loop_exits(assembly: Assembly) -> dict[int, str]:
    """Blocks with one successor in a loop and one outside of it, with the label of that loop's head."""
    blocks = assembly.blocks
    before: list[list[int]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        for successor in block.successors:
            before[successor].append(number)
    exits: dict[int, str] = {}
    for tail, head in _back_edges(assembly):
        inside = {head, tail}
        todo = [tail]
        while todo:
            number = todo.pop()
            if number != head:
                todo += [one for one in before[number] if one not in inside]
                inside.update(before[number])
        for number in inside:
            kinds = {successor in inside for successor in blocks[number].successors}
            if len(kinds) == 2:
                exits[number] = blocks[head].label
    return exits


def _back_edges(assembly: Assembly) -> list[tuple[int, int]]:
    """Edges that close a cycle, found depth first; LLVM's structurizer leaves reducible control flow only."""
    edges: list[tuple[int, int]] = []
    state = [0] * len(assembly.blocks)
    stack: list[tuple[int, int]] = [(0, 0)]
    state[0] = 1
    while stack:
        number, position = stack.pop()
        successors = assembly.blocks[number].successors
        if position == len(successors):
            state[number] = 2
            continue
        stack.append((number, position + 1))
        following = successors[position]
        if state[following] == 1:
            edges.append((number, following))
        elif state[following] == 0:
            state[following] = 1
            stack.append((following, 0))
    return edges
