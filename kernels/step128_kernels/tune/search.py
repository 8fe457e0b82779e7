"""The search: every candidate of every number of rows is judged once, and the fastest is chosen.

Those that meet all gates of our kernels come first; where none does, the fastest of the others serves.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from step128_kernels.errors import KernelToolError
from step128_kernels.tune.journal import Journal, Outcome, candidate_key
from step128_kernels.tuned.names import VLLM_FUSED_MOE, file_name, format_shape
from step128_kernels.tuned.schema import PHASES, Config

Shape = Mapping[str, int]

# Doubling, as in the files vLLM ships; the loader takes the nearest. A phase is offered beyond the crossover's range
# of 8 to 32 rows so that numbers, not this table, place it.
ROWS = {
    "decode": (1, 2, 4, 8, 16, 32),
    "prefill": (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
}


class Space(Protocol):
    """The kernels and what they can be configured with; `step128_kernels.cases` is one."""

    @property
    def SHAPES(self) -> Mapping[str, Sequence[Shape]]:  # noqa: N802
        """Shapes that we ship configurations for, by kernel."""

    def candidates(self, kernel: str, phase: str, shape: Shape, m: int, arch: str) -> Iterable[Config]:
        """Configurations worth trying, `phase` among their keys; none, if the phase is not for that many rows.

        Of equally fast ones the first is chosen, decode before prefill.
        """

    def case(self, kernel: str, shape: Shape, m: int, config: Config, arch: str) -> Any:
        """Return the `KernelCase` of one call."""

    def runner(self, kernel: str, shape: Shape, m: int, config: Config) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Return the kernel's call and the reference's, each giving a tensor.

        Inputs must be the same ones for every configuration of a kernel, shape and `m`.
        """


@dataclass(frozen=True)
class Target:
    """One file to be written: a kernel and shape on a kind of GPU."""

    kernel: str
    shape: Shape
    device: str
    arch: str

    def path(self, output: Path) -> Path:
        """Return the file's place; vLLM's own files have a folder that holds nothing else."""
        folder = output / "vllm" if self.kernel == VLLM_FUSED_MOE else output
        return folder / file_name(self.kernel, self.shape, self.device)

    def __str__(self) -> str:
        return f"{self.kernel} {format_shape(self.shape)} on {self.device}"


@dataclass(frozen=True)
class Candidate:
    """One configuration for one number of rows."""

    target: Target
    rows: int
    config: Config

    @property
    def key(self) -> str:
        """Text that is equal for equal candidates of a target."""
        return candidate_key(self.rows, self.config)


@dataclass(frozen=True)
class Choice:
    """What is chosen for one number of rows, and the gate that it misses, as then all candidates miss one."""

    config: Config
    missed: str | None


Judge = Callable[[Sequence[Candidate]], Iterator[tuple[Candidate, Outcome]]]
"""Gives each candidate's outcome as it comes, in any order; nothing is judged before it is asked for."""


class NothingServesError(KernelToolError):
    """No candidate may serve at some number of rows."""


def candidates_of(space: Space, target: Target) -> list[Candidate]:
    """Return all candidates of a target, each once, in the order in which they are offered."""
    found = {
        (rows, candidate_key(rows, config)): Candidate(target, rows, config)
        for phase in PHASES
        for rows in ROWS[phase]
        for config in space.candidates(target.kernel, phase, target.shape, rows, target.arch)
    }
    return list(found.values())


def search(
    candidates: Sequence[Candidate], judge: Judge, journal: Journal, advance: Callable[[], None]
) -> dict[int, Choice]:
    """Judge what the journal does not hold yet, and return what is chosen by number of rows, ascending.

    Args:
        candidates: all of one target.
        judge: see `Judge`.
        journal: of that target; every outcome goes into it as it comes.
        advance: called for every candidate that is done, those of the journal included.

    Raises:
        NothingServesError: if some number of rows has no candidate that may serve.

    """
    waiting = [candidate for candidate in candidates if candidate.key not in journal.finished]
    # Equal configurations often share compiled code, so a compiler's cache serves them best side by side.
    waiting.sort(key=lambda candidate: (candidate_key(0, candidate.config), candidate.rows))
    for _ in range(len(candidates) - len(waiting)):
        advance()
    for candidate, outcome in judge(waiting):
        journal.record(candidate.rows, candidate.config, outcome)
        advance()
    chosen = {}
    for rows in sorted({candidate.rows for candidate in candidates}):
        outcomes = [(candidate, journal.finished[candidate.key]) for candidate in candidates if candidate.rows == rows]
        chosen[rows] = _fastest(rows, outcomes)
    return chosen


def _fastest(rows: int, outcomes: Sequence[tuple[Candidate, Outcome]]) -> Choice:
    """Of equally fast ones the one offered first, in whatever order outcomes came."""
    serving = [
        (outcome.missed is not None, outcome.seconds, Choice(candidate.config, outcome.missed))
        for candidate, outcome in outcomes
        if outcome.seconds is not None
    ]
    if not serving:
        problems = Counter(str(outcome.problem) for _, outcome in outcomes).most_common(3)
        listed = "; ".join(f"{problem} ({count} of {len(outcomes)})" for problem, count in problems)
        raise NothingServesError(f"{outcomes[0][0].target}: no candidate may serve at {rows} rows: {listed}.")
    return min(serving, key=lambda found: found[:2])[2]
