"""Which steps can change the outcome of a branch: the rest need not run to count."""

from __future__ import annotations

from collections.abc import Sequence

from step128_kernels.offline.operands import Step


def deciding_steps(
    steps: Sequence[Sequence[Step]], successors: Sequence[Sequence[int]], tested: Sequence[frozenset[int]]
) -> list[list[Step]]:
    """Keep, block by block, the steps that write what a later branch may test.

    ``tested`` gives the registers that each block's own branch reads. This is the usual backward analysis of live
    registers, with branches as the only uses that count.
    """
    live_at_start: list[frozenset[int]] = [frozenset() for _ in steps]
    changed = True
    while changed:
        changed = False
        for number in reversed(range(len(steps))):
            live, _ = _walk(steps[number], _live_at_end(number, successors, tested, live_at_start))
            if live != live_at_start[number]:
                live_at_start[number] = live
                changed = True
    return [
        _walk(block, _live_at_end(number, successors, tested, live_at_start))[1] for number, block in enumerate(steps)
    ]


def _live_at_end(
    number: int,
    successors: Sequence[Sequence[int]],
    tested: Sequence[frozenset[int]],
    live_at_start: Sequence[frozenset[int]],
) -> frozenset[int]:
    return tested[number].union(*(live_at_start[following] for following in successors[number]))


def _walk(block: Sequence[Step], live: frozenset[int]) -> tuple[frozenset[int], list[Step]]:
    """Registers that are live before a block, and its steps that count."""
    now = set(live)
    kept: list[Step] = []
    for step in reversed(block):
        if step.writes & now:
            kept.append(step)
            if step.replaces:
                now -= step.writes
            now |= step.reads
    kept.reverse()
    return frozenset(now), kept
