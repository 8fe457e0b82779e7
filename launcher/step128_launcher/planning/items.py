"""Memory items and what they are collected in.

Every item says where its figure comes from: `computed` (from the checkpoint's own sizes), `vLLM's code` (a formula read
there and tested against it), `assumed` (an estimate) or `measured` (an earlier start on this machine, see calibrate).
"""

from dataclasses import dataclass, replace

from step128_launcher.model.weights import RankWeights
from step128_launcher.planning.calibration import Measurement
from step128_launcher.planning.profile_schema import Assumption
from step128_launcher.planning.profiles import Profile

RUNTIME, COLLECTIVES, RUNTIME_MEASURED = "runtime context", "collectives (RCCL/NCCL)", "runtime and collectives"
# The model's whole pool, as one line of the host's memory on a unified machine.
MODEL_LINE = "model and KV cache"

COMPUTED, VLLM_CODE, ASSUMED, MEASURED = "computed", "vLLM's code", "assumed", "measured"
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class MemoryLine:
    """One item: bytes in its pool, what it is, what its figure rests on, and the source of a formula or assumption."""

    name: str
    total_bytes: int
    evidence: str
    explanation: str
    source: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """All items of one pool (`where`) against its budget; it fits if the sum is not above `budget_bytes`."""

    where: str
    lines: tuple[MemoryLine, ...]
    total_memory_bytes: int
    available_bytes: int
    budget_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of all items."""
        return sum(line.total_bytes for line in self.lines)

    @property
    def free_bytes(self) -> int:
        """What the plan leaves of the budget; negative if it does not fit."""
        return self.budget_bytes - self.total_bytes


@dataclass(frozen=True)
class Load:
    """The settings that memory besides the KV cache depends on."""

    dtype: str
    tensor_parallel_size: int
    num_speculative_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vision: bool = True
    attention_backend: str | None = None
    enable_expert_parallel: bool = False
    enforce_eager: bool = True


def kv_line(kv_cache_memory_bytes: int, ranks_in_pool: int, explanation: str) -> MemoryLine:
    """Return the KV cache's item; vLLM's setting is per rank."""
    source = "v1/core/kv_cache_utils.py, compared over all settings in the tests"
    return MemoryLine("KV cache", kv_cache_memory_bytes * ranks_in_pool, VLLM_CODE, explanation, source)


def weights_line(part: RankWeights, ranks: int, source: str) -> MemoryLine:
    """Return one component's item, of all ranks in the pool."""
    name = f"{'draft' if part.draft else 'weights'}: {part.component}"
    line = MemoryLine(name, part.rank_bytes * ranks, COMPUTED, part.explanation, source)
    return line if ranks == 1 else replace(line, explanation=f"{part.explanation}, {ranks} ranks")


def assumed(name: str, assumption: Assumption | None, explanation: str) -> MemoryLine:
    """Return the item of one of the profile's assumptions; nothing if it makes none."""
    if assumption is None:
        return MemoryLine(name, 0, ASSUMED, explanation)
    return MemoryLine(name, int(assumption.value), ASSUMED, explanation, assumption.source)


def process(name: str, field: str, profile: Profile, count: int, explanation: str) -> MemoryLine:
    """Return the item of `count` processes of a kind; `field` is the profile's."""
    return MemoryLine(name, getattr(profile, field) * count, ASSUMED, explanation, profile.source(field))


def measured_line(name: str, total_bytes: int, measured: Measurement) -> MemoryLine:
    """Return an item that an earlier start measured."""
    what = f"an earlier start with these settings, {measured.date}"
    return MemoryLine(name, total_bytes, MEASURED, what, measured.source)
