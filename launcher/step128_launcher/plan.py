"""What the planner takes and gives: the user's limits, the plan, and the refusal when nothing fits."""

from dataclasses import dataclass

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.kv_cache import KvPrediction
from step128_launcher.memory import MemoryPlan


@dataclass(frozen=True)
class Limits:
    """What the user fixed on the command line; None leaves the choice to the planner."""

    max_model_len: int | None = None
    num_speculative_tokens: int | None = None
    kv_cache_dtype: str | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    tensor_parallel_size: int | None = None
    dtype: str | None = None
    block_size: int | None = None
    enforce_eager: bool | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Alternative:
    """A wish that was not followed, and why."""

    wish: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The settings of one server; fields named as vLLM names them, memory per rank where vLLM counts per rank."""

    profile: str
    max_model_len: int
    num_speculative_tokens: int
    kv_cache_dtype: str
    max_num_seqs: int
    max_num_batched_tokens: int
    tensor_parallel_size: int
    dtype: str
    block_size: int
    enforce_eager: bool
    kv_cache_memory_bytes: int
    mm_processor_cache_bytes: int
    prediction: KvPrediction
    omp_threads_bind: str
    memory: MemoryPlan
    reasons: tuple[str, ...]
    rejected: tuple[Alternative, ...]
    warnings: tuple[str, ...]


class DoesNotFitError(LauncherError):
    """No acceptable plan fits; `memory` is the smallest one tried, for the itemised table."""

    def __init__(self, message: str, hint: str, memory: MemoryPlan) -> None:
        super().__init__(ExitCode.DOES_NOT_FIT, message, hint)
        self.memory = memory
