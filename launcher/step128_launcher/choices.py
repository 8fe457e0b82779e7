"""The settings that are decided one by one, before the search: ranks, block size, KV-cache dtype, thread binding."""

from step128_launcher.checkpoint import ModelFootprint
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import Hardware
from step128_launcher.plan import Alternative, Limits
from step128_launcher.profiles import Profile
from step128_launcher.sizes import format_bytes


def usage_error(message: str, hint: str = "") -> LauncherError:
    """Return the error for a limit that contradicts the model or another limit."""
    return LauncherError(ExitCode.USAGE, message, hint)


def tensor_parallel_size(hardware: Hardware, footprint: ModelFootprint, profile: Profile, limits: Limits) -> int:
    """Return the ranks, checked against the model's heads and group sizes.

    Raises:
        LauncherError: 2, if they do not divide what vLLM cuts; 4, if there are fewer CPUs than ranks.

    """
    config = footprint.config
    ranks = limits.tensor_parallel_size or profile.tensor_parallel_size
    cpus = len(hardware.cpu_ids)
    if ranks > cpus:
        raise LauncherError(
            ExitCode.UNSUPPORTED_HARDWARE,
            f"--tensor-parallel-size {ranks} needs {ranks} CPUs, this process may use {cpus}.",
        )
    counts = {
        "attention heads": config.num_attention_heads,
        "sliding-attention heads": config.num_sliding_attention_heads,
        "KV heads": config.num_kv_heads,
        "vision heads": config.vision.heads,
        "16-channel groups of an expert": config.moe_intermediate_size // 16,
        "16-channel groups of the shared expert": config.shared_expert_size // 16,
        "16-channel groups of a dense MLP": config.intermediate_size // 16,
    }
    for what, count in counts.items():
        if count % ranks:
            raise usage_error(f"--tensor-parallel-size {ranks} does not divide the model's {count} {what}.")
    return ranks


def block_size_tokens(footprint: ModelFootprint, profile: Profile, limits: Limits) -> int:
    """Return the tokens of a KV-cache block.

    Raises:
        LauncherError: 2, if vLLM's CPU attention cannot use it, or the model's longest context is shorter.

    """
    block_size = limits.block_size or profile.block_size
    longest = footprint.config.max_position_embeddings
    if block_size > longest:
        raise usage_error(
            f"--block-size {block_size} is above the model's longest context of {longest} tokens: "
            "one block would hold more than any request needs.",
            f"Profile {profile.name} uses {profile.block_size}.",
        )
    if block_size % 32:
        raise usage_error(f"--block-size {block_size} is no multiple of 32, which vLLM's CPU attention needs.")
    return block_size


def kv_cache_dtype(
    footprint: ModelFootprint, profile: Profile, limits: Limits
) -> tuple[str, str, tuple[Alternative, ...]]:
    """Return "fp8" or "auto" (the serving dtype), why, and what was rejected for it.

    Raises:
        LauncherError: 2, if fp8 was asked for and the checkpoint has no scales that would take effect.

    """
    scales = footprint.kv_scales is not None
    # vLLM makes the scales' parameters only in a quantized model; elsewhere it would use 1.0 without a word.
    usable = scales and footprint.quantization is not None
    why_not = "it is not quantized, so vLLM would ignore them" if scales else "it has none"
    if limits.kv_cache_dtype == "fp8" and not usable:
        raise usage_error(
            f"--kv-cache-dtype fp8 needs calibrated KV scales from the checkpoint, but {why_not}.",
            "Calibrate and quantize it with step128-checkpoint, or leave out --kv-cache-dtype.",
        )
    if limits.kv_cache_dtype:
        name = "the serving dtype" if limits.kv_cache_dtype == "auto" else limits.kv_cache_dtype
        return limits.kv_cache_dtype, f"KV cache in {name}: asked for.", ()
    if usable and profile.prefer_fp8_kv_cache:
        which = "trunk layer" if footprint.unscaled_layers else "attention layer"
        return "fp8", f"KV cache in fp8: the checkpoint has calibrated scales for every {which}.", ()
    reason = f"needs calibrated scales from a quantized checkpoint; {why_not}"
    if usable:
        reason = f"profile {profile.name} prefers the serving dtype"
    return "auto", "KV cache in the serving dtype.", (Alternative("kv_cache_dtype fp8", reason),)


def memory_shortage(hardware: Hardware, memory_bytes: int | None) -> str | None:
    """Return what is wrong with a budget (--memory) that this machine cannot give, or None."""
    available = hardware.memory_available_bytes
    if memory_bytes is None or memory_bytes <= available:
        return None
    return f"--memory {format_bytes(memory_bytes)} is above the {format_bytes(available)} available on this machine."


def omp_threads_bind(hardware: Hardware, ranks: int) -> str:
    """Return VLLM_CPU_OMP_THREADS_BIND: which CPUs each rank's threads run on.

    vLLM's own choice ("auto") keeps one CPU free for the scheduler and wants one NUMA node a rank; on a few CPUs, or
    with several ranks, they are dealt out here.
    """
    cpus = hardware.cpu_ids
    if ranks == 1 and len(cpus) > 4:
        return "auto"
    share = len(cpus) // ranks
    return "|".join(",".join(map(str, cpus[rank * share : (rank + 1) * share])) for rank in range(ranks))
