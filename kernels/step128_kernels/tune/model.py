"""Candidates without a GPU: each compiled and counted, and put behind the others if it misses a gate of our kernels."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Protocol

from step128_kernels.errors import KernelToolError, ToolEnvironmentError
from step128_kernels.offline.cost import DEVICES
from step128_kernels.tune.journal import Outcome
from step128_kernels.tune.search import Candidate, Judge
from step128_kernels.tuned.names import VLLM_FUSED_MOE

METHOD = (
    "by the cost model over compiled code (step128-kernels inspect), least of the root of squares of issuing, waiting "
    "for memory and moving the weights or the KV cache, among candidates with no spills, those that meet the gates of "
    "their phase first; for vllm_fused_moe, least of issuing or moving the weights, whichever is longer, its own "
    "default winning ties"
)

_LEAST_DECODE_WAVES_PER_SIMD = 8
_LEAST_WEIGHT_LOAD_BITS = 128
# Vector operations per weight that a decode kernel may take, up to that many rows.
_MOST_DECODE_VALU_PER_WEIGHT = {1: 4.0, 4: 6.0, 8: 8.0}
# Work-groups of attention at one sequence, per compute unit, from this context on: what splitting the keys is for.
_LEAST_WORKGROUPS_PER_UNIT = 2
_DEEP_CONTEXT = 65536
# Lanes' instructions per byte of an FP8 cache with hardware conversion, by query tokens, from this context on: below it
# what every work-group does once counts for more than the keys.
_MOST_INSTRUCTIONS_PER_KV_BYTE = {1: 3.0, 4: 8.0}
_COUNTED_CONTEXT = 8192


class Report(Protocol):
    """What the gates and the ranking read of an offline report."""

    @property
    def spills(self) -> int: ...  # noqa: D102
    @property
    def scratch_bytes(self) -> int: ...  # noqa: D102
    @property
    def waves_per_simd(self) -> float: ...  # noqa: D102
    @property
    def valu_per_weight(self) -> float: ...  # noqa: D102
    @property
    def wmma(self) -> int: ...  # noqa: D102
    @property
    def ranking_seconds(self) -> float: ...  # noqa: D102
    @property
    def load_bits(self) -> Mapping[str, int]: ...  # noqa: D102
    @property
    def workgroups(self) -> int: ...  # noqa: D102
    @property
    def lane_inst_per_byte(self) -> float: ...  # noqa: D102


def outcome_of(report: Report, candidate: Candidate) -> Outcome:
    """Return the predicted seconds of a call and the first gate that it misses; spilled registers rule it out."""
    if report.spills or report.scratch_bytes:
        return Outcome(problem="spills registers")
    return Outcome(seconds=report.ranking_seconds, missed=_missed_gate(report, candidate))


def _missed_gate(report: Report, candidate: Candidate) -> str | None:
    if candidate.target.kernel == VLLM_FUSED_MOE:
        return None  # the other gates are for kernels of our own
    if candidate.target.kernel.startswith("attention_"):
        return _missed_attention_gate(report, candidate)
    load_bits = report.load_bits.get("tiles_ptr")
    if load_bits is None:  # tensors of 2 GiB and more are addressed in ways that cannot be followed to their argument
        return "the width of weight loads could not be told"
    if load_bits < _LEAST_WEIGHT_LOAD_BITS:
        return f"weights are loaded by fewer than {_LEAST_WEIGHT_LOAD_BITS} bits"
    if candidate.config["phase"] == "prefill":
        return None if report.wmma else "no WMMA"
    if report.waves_per_simd < _LEAST_DECODE_WAVES_PER_SIMD:
        return f"fewer than {_LEAST_DECODE_WAVES_PER_SIMD} waves per SIMD"
    limit = next((most for upto, most in _MOST_DECODE_VALU_PER_WEIGHT.items() if candidate.rows <= upto), None)
    if limit is not None and report.valu_per_weight > limit:
        return f"more than {limit:g} vector operations per weight"
    return None


def _missed_attention_gate(report: Report, candidate: Candidate) -> str | None:
    if not report.wmma:
        return "no WMMA"
    target = candidate.target
    if candidate.config["phase"] == "prefill" or target.shape["W"]:
        return None
    context, units = target.shape["C"], DEVICES[target.arch].compute_units
    if context >= _DEEP_CONTEXT and report.workgroups < _LEAST_WORKGROUPS_PER_UNIT * units:
        return f"fewer than {_LEAST_WORKGROUPS_PER_UNIT} work-groups for each compute unit"
    limit = _MOST_INSTRUCTIONS_PER_KV_BYTE.get(candidate.rows)
    converts = target.kernel == "attention_fp8" and target.arch == "gfx1201"
    if converts and limit is not None and context >= _COUNTED_CONTEXT and report.lane_inst_per_byte > limit:
        return f"more than {limit:g} instructions per byte of the KV cache"
    return None


@contextmanager
def modelling(judge_one: Callable[[Candidate], Outcome], jobs: int) -> Iterator[Judge]:
    """Give a judge that works in parallel processes, which live as long as the context.

    Args:
        judge_one: a function at the top of a module, as other processes must find it.
        jobs: number of processes; with 1 all is done in this one.

    """
    if jobs == 1:
        yield lambda candidates: ((candidate, judge_one(candidate)) for candidate in candidates)
        return
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare_process)
    try:
        yield lambda candidates: _judge_all(pool, judge_one, candidates)
    finally:
        pool.shutdown(cancel_futures=True)


def _judge_all(
    pool: ProcessPoolExecutor, judge_one: Callable[[Candidate], Outcome], candidates: Sequence[Candidate]
) -> Iterator[tuple[Candidate, Outcome]]:
    """LLVM ends its process on some errors: that ends the run, and is told."""
    try:
        waiting = {pool.submit(judge_one, candidate): candidate for candidate in candidates}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    except BrokenProcessPool as error:
        raise KernelToolError(
            "A compiling process died; its last words are above. What was finished is kept: the same command goes on "
            "from there. With --jobs 1 the candidate that kills it is the last one begun."
        ) from error


def _prepare_process() -> None:
    """An interrupt is the parent's to handle, and a parent that was killed must not leave this process behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def model_one(candidate: Candidate) -> Outcome:
    """Compile and count one candidate.

    Raises:
        ToolEnvironmentError: if nothing can be compiled here.

    """
    from step128_kernels.tune.spaces import inspector_of, space_of

    target, config = candidate.target, candidate.config
    try:
        case = space_of(target.kernel).case(target.kernel, target.shape, candidate.rows, config, target.arch)
        return outcome_of(inspector_of(target.kernel)(case), candidate)
    except ToolEnvironmentError:
        raise
    except KernelToolError as error:
        return Outcome(problem=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
