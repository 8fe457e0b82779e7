"""The user's limits, the profile and the model -> the values that the search combines; each checked on its own."""

import math

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.machine.types import AMD, Gpu, Hardware
from step128_launcher.machine.visibility import hip_order
from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.model.weights import indivisible
from step128_launcher.planning.budget import Budget
from step128_launcher.planning.candidates import Space
from step128_launcher.planning.objective import WISHED_CONTEXT_TOKENS
from step128_launcher.planning.plan import Alternative, Limits
from step128_launcher.planning.profile_schema import AttentionBackend
from step128_launcher.planning.profiles import Profile
from step128_launcher.planning.reserved import OUR_ATTENTION_BACKEND


def usage_error(message: str, hint: str = "") -> LauncherError:
    """Return the error for a limit that contradicts the model or another limit."""
    return LauncherError(ExitCode.USAGE, message, hint)


def make_space(
    hardware: Hardware, footprint: ModelFootprint, profile: Profile, limits: Limits, budget: Budget
) -> tuple[Space, tuple[Alternative, ...]]:
    """Return all values to combine, and the values that were left out, with the reason.

    Raises:
        LauncherError: 2, if a limit contradicts the model; 4, if there are fewer CPUs or GPUs than ranks.

    """
    if limits.pipeline_parallel_size != 1:
        raise usage_error(
            f"--pipeline-parallel-size {limits.pipeline_parallel_size}: vLLM refuses pipeline parallelism with this "
            "model's MTP layers ('not supported for this model'), and step128 plans none without them either.",
            "Use --tensor-parallel-size.",
        )
    wished = context_ceiling(footprint, profile, limits)
    rejected: list[Alternative] = []
    dtype = limits.dtype or profile.dtype
    backends = _attention_backends(profile, limits)
    if dtype == "float32" and backends[0] is not None and backends[0].name == OUR_ATTENTION_BACKEND:
        raise usage_error(
            f"--dtype float32: our attention kernels ({OUR_ATTENTION_BACKEND}) take 16-bit values on a GPU, and vLLM "
            "would refuse to start.",
            _for_float32(profile),
        )
    dtypes, refused = kv_cache_dtypes(footprint, profile, limits, backends[0])
    rejected += refused
    dtypes = _dtypes_of_backend(dtypes, backends[0], limits)
    ranks, refused = _tensor_parallel_sizes(hardware, footprint, profile, limits, budget)
    rejected += refused
    depths, refused = _depths(footprint, profile, limits)
    rejected += refused
    seqs = (limits.max_num_seqs,) if limits.max_num_seqs else _halving(profile.max_num_seqs, 1)
    batched = _halving(profile.max_num_batched_tokens, profile.min_num_batched_tokens or profile.max_num_batched_tokens)
    if limits.max_num_batched_tokens:
        batched = (limits.max_num_batched_tokens,)
    if max(batched) < min(seqs):
        whose = "" if limits.max_num_batched_tokens else f" (of profile {profile.name})"
        raise usage_error(
            f"max_num_batched_tokens {max(batched)}{whose} is below max_num_seqs {min(seqs)}; "
            "vLLM schedules at least one token a request.",
            "Give --max-num-batched-tokens and --max-num-seqs so that the first is not smaller.",
        )
    space = Space(
        dtype=dtype,
        block_size=block_size_tokens(footprint, profile, limits),
        enforce_eager=profile.enforce_eager if limits.enforce_eager is None else limits.enforce_eager,
        enable_expert_parallel=limits.enable_expert_parallel,
        # Two batches are in flight with async scheduling, vLLM's default on a GPU; on a CPU it turns that off.
        concurrent_batches=1 if profile.device == "cpu" else 2,
        wished_context=wished,
        shortest_context=min(wished, limits.max_model_len or profile.min_model_len),
        tensor_parallel_sizes=ranks,
        depths=depths,
        kv_cache_dtypes=dtypes,
        max_num_seqs=tuple(count for count in seqs if count <= max(batched)),
        max_num_batched_tokens=batched,
        vision=(True, False) if limits.vision is None else (limits.vision,),
        attention_backends=backends,
    )
    return space, tuple(rejected)


def context_ceiling(footprint: ModelFootprint, profile: Profile, limits: Limits) -> int:
    """Return the longest context to strive for: the user's, else the least of the model's, profile's, objective's."""
    model_max, asked = footprint.config.max_position_embeddings, limits.max_model_len
    if asked is not None and asked > model_max:
        raise usage_error(f"--max-model-len {asked} is above the model's own maximum of {model_max} tokens.")
    if asked is not None:
        return asked
    wish = WISHED_CONTEXT_TOKENS[limits.objective]
    return min(model_max, profile.max_model_len, model_max if wish is None else wish)


def block_size_tokens(footprint: ModelFootprint, profile: Profile, limits: Limits) -> int:
    """Return the tokens of a KV-cache block.

    Raises:
        LauncherError: 2, if the profile's attention cannot use it, or the model's longest context is shorter.

    """
    block_size = limits.block_size or profile.block_size
    longest = footprint.config.max_position_embeddings
    if block_size > longest:
        raise usage_error(
            f"--block-size {block_size} is above the model's longest context of {longest} tokens: "
            "one block would hold more than any request needs.",
            f"Profile {profile.name} uses {profile.block_size}.",
        )
    if block_size % profile.block_size_multiple:
        raise usage_error(
            f"--block-size {block_size} is no multiple of {profile.block_size_multiple}, which the attention of "
            f"profile {profile.name} needs."
        )
    return block_size


def kv_cache_dtypes(
    footprint: ModelFootprint, profile: Profile, limits: Limits, backend: AttentionBackend | None = None
) -> tuple[tuple[str, ...], tuple[Alternative, ...]]:
    """Return the dtypes to try, the preferred one first ("auto" is the serving dtype), and what was left out.

    Preferred is what `backend` decodes faster with, where the profile knows, else what the profile prefers.

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
        return (limits.kv_cache_dtype,), ()
    if not usable:
        reason = f"needs calibrated scales from a quantized checkpoint; {why_not}"
        return ("auto",), (Alternative("kv_cache_dtype fp8", reason),)
    faster = backend.faster_kv_cache_dtype if backend is not None else None
    prefers_fp8 = profile.prefer_fp8_kv_cache if faster is None else faster.value == "fp8"
    return ("fp8", "auto") if prefers_fp8 else ("auto", "fp8"), ()


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


def device_selection(hardware: Hardware, chosen: tuple[Gpu, ...]) -> tuple[tuple[str, str], ...]:
    """Return the variable that shows vLLM the chosen GPUs only, if there are others it might take (an iGPU, say).

    Nothing is set if the user has set such a variable: two of them together hang RCCL (peers: kyuz0's R9700 toolbox).
    """
    if hardware.visible_devices or not chosen:
        return ()
    same = tuple(gpu for gpu in hardware.usable_gpus if gpu.vendor == chosen[0].vendor)
    if len(same) == len(chosen):
        return ()
    if chosen[0].vendor == AMD:
        ordered = hip_order(same)
        indices = [index for index, gpu in enumerate(ordered) if gpu in chosen]
        name = "HIP_VISIBLE_DEVICES"
    else:
        indices = [index for index, gpu in enumerate(same) if gpu in chosen]
        name = "CUDA_VISIBLE_DEVICES"
    return ((name, ",".join(map(str, indices))),) if len(indices) == len(chosen) else ()


def _tensor_parallel_sizes(
    hardware: Hardware, footprint: ModelFootprint, profile: Profile, limits: Limits, budget: Budget
) -> tuple[tuple[int, ...], tuple[Alternative, ...]]:
    """Return the numbers of ranks that the machine has and vLLM can cut the model into."""
    on_cpu = profile.device == "cpu"
    most = len(hardware.cpu_ids) if on_cpu else len(budget.gpus)
    what = "CPUs" if on_cpu else "GPUs of this profile"
    asked = limits.tensor_parallel_size
    if asked is not None:
        if asked > most:
            raise LauncherError(
                ExitCode.UNSUPPORTED_HARDWARE,
                f"--tensor-parallel-size {asked} needs {asked} {what}, this process may use {most}.",
            )
        complaint = indivisible(footprint, asked, expert_parallel=limits.enable_expert_parallel)
        if complaint:
            raise usage_error(f"--tensor-parallel-size {asked}: {complaint}")
        return (asked,), ()
    sizes, rejected = [], []
    for ranks in profile.tensor_parallel_sizes:
        if ranks > most:
            rejected.append(Alternative(f"tensor_parallel_size {ranks}", f"needs {ranks} {what}, there are {most}"))
            continue
        complaint = indivisible(footprint, ranks, expert_parallel=limits.enable_expert_parallel)
        if complaint:
            rejected.append(Alternative(f"tensor_parallel_size {ranks}", complaint.rstrip(".")))
        else:
            sizes.append(ranks)
    if not sizes:
        raise LauncherError(
            ExitCode.UNSUPPORTED_HARDWARE,
            f"No number of ranks of profile {profile.name} fits: "
            + "; ".join(f"{alternative.wish}: {alternative.reason}" for alternative in rejected)
            + ".",
        )
    return tuple(sizes), tuple(rejected)


def _depths(
    footprint: ModelFootprint, profile: Profile, limits: Limits
) -> tuple[tuple[int, ...], tuple[Alternative, ...]]:
    """Return the MTP depths to try, deepest first."""
    present, asked = footprint.mtp_layers, limits.num_speculative_tokens
    if asked is not None:
        if asked > present:
            raise usage_error(
                f"--num-speculative-tokens {asked} needs as many MTP layers; the checkpoint has {present}.",
            )
        return (asked,), ()
    deepest = min(present, profile.num_speculative_tokens)
    depths = tuple(range(deepest, -1, -1))
    if deepest < profile.num_speculative_tokens:
        wish = f"num_speculative_tokens {profile.num_speculative_tokens}"
        return depths, (Alternative(wish, f"the checkpoint has {present} MTP layers"),)
    return depths, ()


def _attention_backends(profile: Profile, limits: Limits) -> tuple[AttentionBackend | None, ...]:
    """Return the profile's first backend, or the one asked for: no other is taken to gain memory."""
    asked = limits.attention_backend
    if asked is None:
        return profile.attention_backends[:1] or (None,)
    known = [backend for backend in profile.attention_backends if backend.name == asked]
    if known:
        return (known[0],)
    names = ", ".join(backend.name for backend in profile.attention_backends)
    raise usage_error(f"--attention-backend {asked} is not in profile {profile.name} (known there: {names or 'none'}).")


def _for_float32(profile: Profile) -> str:
    others = [backend.name for backend in profile.attention_backends if backend.name != OUR_ATTENTION_BACKEND]
    other = f", or name another backend: --attention-backend {others[0]}" if others else ""
    return f"Use --dtype bfloat16{other}."


def _dtypes_of_backend(dtypes: tuple[str, ...], backend: AttentionBackend | None, limits: Limits) -> tuple[str, ...]:
    """Return the KV dtypes that a backend asked for by name can take; contradictions are refused, not searched."""
    if limits.attention_backend is None or backend is None:
        return dtypes
    longest, asked = backend.max_model_len, limits.max_model_len
    if longest is not None and asked is not None and asked > longest:
        raise usage_error(
            f"--attention-backend {backend.name} is for contexts of at most {longest}, not {asked}: {backend.why}."
        )
    fitting = tuple(dtype for dtype in dtypes if not backend.kv_cache_dtypes or dtype in backend.kv_cache_dtypes)
    if not fitting:
        raise usage_error(f"--attention-backend {backend.name} is not for kv_cache_dtype {dtypes[0]}: {backend.why}.")
    return fitting


def _halving(largest: int, smallest: int) -> tuple[int, ...]:
    steps = int(math.log2(largest / smallest)) if largest > smallest else 0
    return tuple(largest >> step for step in range(steps + 1))
