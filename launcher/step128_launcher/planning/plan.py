"""What the planner takes and gives: the user's limits, the plan, and the refusal when nothing fits."""

from dataclasses import dataclass

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.planning.items import MODEL_LINE, MemoryPlan
from step128_launcher.planning.kv_cache import KvPrediction
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
    another. `measuring_utilization` is the gpu_memory_utilization with which vLLM fills the budget by itself.
    `fallbacks` are leaner plans, in the order to try them should this one run out of memory at its start.
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
    measuring_utilization: float | None
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

    @property
    def binding_memory(self) -> MemoryPlan:
        """Of the pools that hold the model (on a unified machine the host's does, too) the one with the least room."""
        host = self.host_memory
        holds_model = host is not None and any(line.name == MODEL_LINE for line in host.lines)
        return host if host is not None and holds_model and host.free_bytes < self.memory.free_bytes else self.memory


class DoesNotFitError(LauncherError):
    """No acceptable plan fits; `memory` is what the smallest one tried lacks, for the itemised table.

    `host_memory` is the host's where that is another pool; `remedies` are what would help, one sentence each.
    """

    def __init__(
        self,
        message: str,
        hint: str,
        memory: MemoryPlan,
        rejected: tuple[Alternative, ...] = (),
        host_memory: MemoryPlan | None = None,
        remedies: tuple[str, ...] = (),
    ) -> None:
        super().__init__(ExitCode.DOES_NOT_FIT, message, hint)
        self.memory = memory
        self.rejected = rejected
        self.host_memory = host_memory
        self.remedies = remedies
