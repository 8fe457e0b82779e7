"""What the planner takes and gives: the user's limits, the plan, and the refusal when nothing fits."""

from dataclasses import dataclass

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.planning.kv_cache import KvPrediction
from step128_launcher.planning.memory import MemoryPlan
from step128_launcher.planning.speculation import SpeedRow

OBJECTIVES = ("balanced", "context", "throughput", "latency")


@dataclass(frozen=True)
class Limits:
    """What the user fixed on the command line; None leaves the choice to the planner.

    `memory_bytes` is the budget of the memory pool that holds the model: of each GPU, or of the host on a CPU.
    """

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
    vision: bool | None = None
    attention_backend: str | None = None
    enable_expert_parallel: bool = False
    pipeline_parallel_size: int = 1
    objective: str = "balanced"
    acceptance: tuple[float, ...] | None = None
    acceptance_unconditional: bool = False


@dataclass(frozen=True)
class Alternative:
    """A wish that was not followed, and why; `missing_bytes` where memory was what it lacked."""

    wish: str
    reason: str
    missing_bytes: int | None = None


@dataclass(frozen=True)
class Expected:
    """What vLLM should report after its start, bytes on one rank; 0 where its backend reports no such figure."""

    weights_bytes: int
    activation_bytes: int
    graph_bytes: int
    non_torch_bytes: int


@dataclass(frozen=True)
class Plan:
    """The settings of one server; fields named as vLLM names them, memory per rank where vLLM counts per rank.

    `memory` is the pool that holds the model (each GPU, or the host on a CPU); `host_memory` the host's where that is
    another. `fallbacks` are leaner plans, in the order to try them should this one run out of memory at its start.
    """

    profile: str
    device: str
    objective: str
    max_model_len: int
    num_speculative_tokens: int
    kv_cache_dtype: str
    max_num_seqs: int
    max_num_batched_tokens: int
    tensor_parallel_size: int
    enable_expert_parallel: bool
    dtype: str
    block_size: int
    enforce_eager: bool
    vision: bool
    attention_backend: str | None
    gpu_memory_utilization: float | None
    kv_cache_memory_bytes: int
    mm_processor_cache_bytes: int
    prediction: KvPrediction
    environment: tuple[tuple[str, str], ...]
    arguments: tuple[str, ...]
    gpu_addresses: tuple[str, ...]
    memory: MemoryPlan
    host_memory: MemoryPlan | None
    expected: Expected
    speed: tuple[SpeedRow, ...]
    speed_sources: tuple[tuple[str, str], ...]
    reasons: tuple[str, ...]
    rejected: tuple[Alternative, ...]
    wish: tuple[str, ...]
    warnings: tuple[str, ...]
    considered: int
    fallbacks: tuple["Plan", ...] = ()


class DoesNotFitError(LauncherError):
    """No acceptable plan fits; `memory` is the smallest one tried, for the itemised table."""

    def __init__(self, message: str, hint: str, memory: MemoryPlan, rejected: tuple[Alternative, ...] = ()) -> None:
        super().__init__(ExitCode.DOES_NOT_FIT, message, hint)
        self.memory = memory
        self.rejected = rejected
