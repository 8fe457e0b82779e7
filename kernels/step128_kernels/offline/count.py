"""How often every block of a launch runs, summed over all programs and waves."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from step128_kernels.errors import CountingError
from step128_kernels.launch import Launch
from step128_kernels.offline.asm import Assembly, parse_assembly
from step128_kernels.offline.compile import Compiled
from step128_kernels.offline.scalar import Trace, UndecidedError, WaveRunner

MOST_RUNS = 500_000
MOST_DECISIONS = 256


@dataclass(frozen=True)
class LaunchCount:
    """Work of one launch."""

    assembly: Assembly
    classes: tuple[tuple[tuple[int, ...], int], ...]
    """Kinds of waves: how often each block runs in one wave, and the number of such waves."""
    waves: int
    workgroups: int
    assumptions: tuple[str, ...]
    """Branches that could not be decided and were taken the way that executes more."""
    loaded_from: dict[tuple[int, int], str]
    """Pointer argument that a vector load (block, instruction) reads, where it could be told."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """How often each block runs in the whole launch, counted per wave."""
        return tuple(sum(counts[i] * waves for counts, waves in self.classes) for i in range(len(self.assembly.blocks)))


def count_launch(compiled: Compiled, launch: Launch) -> LaunchCount:
    """Count a compiled launch.

    Programs are run once for each value of the coordinates that some branch depends on, and multiplied by the rest.

    Raises:
        CountingError: an instruction is not understood, or a loop's end depends on something unknown.
    """
    assembly = parse_assembly(compiled.assembly)
    runner = WaveRunner(assembly, compiled.arch, launch, compiled.arguments)
    sizes = (*launch.grid, launch.num_warps)
    weights = [_weight(assembly, number) for number in range(len(assembly.blocks))]
    axes = 0
    while True:
        found: Counter[tuple[int, ...]] = Counter()
        assumed: dict[int, str] = {}
        depends = 0
        ranges = [range(size) if axes >> axis & 1 else range(1) for axis, size in enumerate(sizes)]
        share = 1
        for axis, size in enumerate(sizes):
            share *= 1 if axes >> axis & 1 else size
        runs = 1
        for one in ranges:
            runs *= len(one)
        if runs > MOST_RUNS:
            raise CountingError(f"{launch.name}: {runs} programs may all differ; at most {MOST_RUNS} are run")
        for x, y, z, wave in itertools.product(*ranges):
            trace, decisions, more = _run(runner, (x, y, z), wave, weights)
            depends |= more
            if depends & ~axes:
                break
            counts = tuple(trace.counts)
            if counts not in found:  # what it loads is told once for each kind of wave
                runner.run((x, y, z), wave, decisions, addresses=True)
            found[counts] += share
            assumed |= trace.assumed
        if not depends & ~axes:
            break
        axes |= depends
    workgroups = launch.grid[0] * launch.grid[1] * launch.grid[2]
    return LaunchCount(
        assembly=assembly,
        classes=tuple(found.items()),
        waves=workgroups * launch.num_warps,
        workgroups=workgroups,
        assumptions=tuple(
            f"{assembly.blocks[number].instructions[-1].text} at {assembly.blocks[number].label}: {reason}"
            for number, reason in sorted(assumed.items())
        ),
        loaded_from={site: min(names) for site, names in runner.loaded_from.items() if len(names) == 1},
    )


def _weight(assembly: Assembly, number: int) -> int:
    return sum(2 if one.is_valu else 1 for one in assembly.blocks[number].instructions)


def _run(
    runner: WaveRunner, program: tuple[int, int, int], wave: int, weights: Sequence[int]
) -> tuple[Trace, dict[int, bool], int]:
    """Run one wave with every decision of its unknown branches.

    Returns the trace with the most work, its decisions, and what the branches of any of them depended on.
    """
    best: tuple[Trace, dict[int, bool]] | None = None
    most = -1
    depends = 0
    todo: list[dict[int, bool]] = [{}]
    tried = 0
    while todo:
        decisions = todo.pop()
        tried += 1
        if tried > MOST_DECISIONS:
            raise CountingError(f"{runner.assembly.name}: too many branches depend on unknown values")
        try:
            trace = runner.run(program, wave, decisions)
        except UndecidedError as undecided:
            todo += [decisions | {undecided.block: taken} for taken in (True, False)]
            continue
        depends |= trace.depends
        work = sum(count * weight for count, weight in zip(trace.counts, weights, strict=True))
        if work > most:
            best, most = (trace, decisions), work
    assert best is not None
    return *best, depends
