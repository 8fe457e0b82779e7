"""Did vLLM's start end for want of memory? What it says then, and what the kernel counts."""

import re

from step128_launcher.supervisor.vllm_log import cause

# Texts of vLLM 0.32, torch and the ROCm and CUDA runtimes; a start that dies of one of them lacked memory.
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
    r"|Cannot allocate memory"  # the C library's ENOMEM
)
# What the runtimes print before they abort, or before an exception that does not say why (RCCL): no exception itself.
_FATAL = re.compile(r"HSA_STATUS_ERROR_OUT_OF_RESOURCES|HIP failure 'out of memory'")
# Exceptions of the other ranks when one is gone; they come after the cause.
_PEER_GONE = re.compile(
    r"Connection (?:closed|reset) by peer|DistBackendError|DistNetworkError|ncclRemoteError|Broken pipe|BrokenPipeError"
)
_IGNORED = "Exception ignored in"  # by the interpreter at its end; the next exception is the ignored one
_EXCEPTION_LINE = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception)\b(?::|$)")
_LONGEST = 400  # characters of a line that are shown: vLLM's own hints behind them are about its flags, not ours


def memory_complaint(lines: list[str]) -> str | None:
    """Return the line that tells that a start died for want of memory, cut to a readable length, or None.

    Only the cause of its death counts: a want of memory that vLLM itself coped with is in the log as well.
    """
    telling = [line for line in cause(_without_aftermath(lines)) if _TEXTS.search(line)]
    telling += [line for line in lines if _FATAL.search(line)]
    if not telling:
        return None
    return telling[0] if len(telling[0]) <= _LONGEST else telling[0][:_LONGEST] + " …"


def _without_aftermath(lines: list[str]) -> list[str]:
    """Return the lines without the exceptions that one rank's death brings about elsewhere."""
    kept, ignored = [], False
    for line in lines:
        ignored |= _IGNORED in line
        exception = _EXCEPTION_LINE.match(line) is not None
        if not (exception and (ignored or _PEER_GONE.search(line))):
            kept.append(line)
        ignored &= not exception
    return kept


def killed_for_memory(kills_before: int | None, kills_now: int | None) -> bool:
    """Return whether the kernel killed for want of memory in between (procfs.oom_kills).

    It counts for the whole machine, so this means something only for a process that was killed.
    """
    return kills_before is not None and kills_now is not None and kills_now > kills_before
