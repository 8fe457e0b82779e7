"""Did vLLM's start end for want of memory? What it says then, and what the kernel counts."""

import re

# Texts of vLLM 0.32, torch and the ROCm and CUDA runtimes; a start that logs one of them and dies lacked memory.
_TEXTS = re.compile(
    r"OutOfMemoryError"  # torch.OutOfMemoryError, torch.cuda.OutOfMemoryError
    r"|(?:HIP|CUDA) (?:error: )?out of memory"
    r"|hipErrorOutOfMemory|cudaErrorMemoryAllocation"
    r"|is less than desired (?:GPU|CPU) memory utilization"  # v1/worker/utils.py, cpu_worker.py
    r"|is less than requested memory for kv"  # cpu_worker.py
    r"|is less than the engine's budget"  # v1/worker/utils.py
    r"|larger than the available KV cache memory"  # v1/core/kv_cache_utils.py
    r"|No available memory for the cache blocks"  # the same
    r"|not enough GPU memory available"  # the same, with an automatic length
    r"|DefaultCPUAllocator: (?:can't allocate memory|not enough memory)"  # torch
    r"|^MemoryError\b"
)
_LONGEST = 400  # characters of a line that are shown: vLLM's own hints behind them are about its flags, not ours


def memory_complaint(lines: list[str]) -> str | None:
    """Return the first line of a log that tells of missing memory, cut to a readable length, or None."""
    for line in lines:
        if _TEXTS.search(line):
            return line if len(line) <= _LONGEST else line[:_LONGEST] + " …"
    return None


def killed_for_memory(kills_before: int | None, kills_now: int | None) -> bool:
    """Return whether the kernel killed for want of memory in between (procfs.oom_kills).

    It counts for the whole machine, so this means something only for a process that was killed.
    """
    return kills_before is not None and kills_now is not None and kills_now > kills_before
