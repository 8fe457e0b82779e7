"""The tables of a plan or a refusal: the pool that holds the model, and the host's memory beside it."""

from step128_launcher.machine.types import Hardware
from step128_launcher.planning.budget import HOST_MEMORY, Budget
from step128_launcher.planning.items import COMPUTED, MODEL_LINE, Load, MemoryLine, MemoryPlan, kv_line
from step128_launcher.planning.memory import Ledger


def memory_tables(
    hardware: Hardware,
    budget: Budget,
    ledger: Ledger,
    load: Load,
    kv_cache_memory_bytes: int,
    kv_note: str,
    shared_note: str,
) -> tuple[MemoryPlan, MemoryPlan | None]:
    """Return the model's pool, and the host's memory; None for it on a CPU, where the pool is the host's memory.

    `kv_cache_memory_bytes` are of one rank, as vLLM's setting is. `kv_note` explains the KV cache's line, `shared_note`
    the model's line in the host's table, on a machine whose GPU takes its memory from the host's.
    """
    kv = kv_line(kv_cache_memory_bytes, ledger.ranks_in_pool(load), kv_note)
    pool = MemoryPlan(
        budget.where(load.tensor_parallel_size),
        (*ledger.lines(load), kv),
        budget.total_bytes,
        budget.available_bytes,
        budget.budget_bytes,
    )
    if budget.host_budget_bytes is None or budget.host_available_bytes is None:
        return pool, None
    lines = ledger.host_lines(load)
    if budget.shared:
        lines = (MemoryLine(MODEL_LINE, pool.total_bytes, COMPUTED, shared_note), *lines)
    total = hardware.memory_total_bytes
    return pool, MemoryPlan(HOST_MEMORY, lines, total, budget.host_available_bytes, budget.host_budget_bytes)
