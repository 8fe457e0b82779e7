"""What a plan that fits still warns of."""

from step128_launcher.model.footprint import ModelFootprint
from step128_launcher.planning.budget import Budget, memory_shortage
from step128_launcher.planning.candidates import Candidate
from step128_launcher.planning.explain import dtype_name
from step128_launcher.planning.plan import Limits
from step128_launcher.planning.profiles import Profile
from step128_launcher.planning.reserved import OUR_ATTENTION_BACKEND

# No FP8 instructions (vLLM's supports_fp8 names CDNA and RDNA4 only), so vLLM's kernels convert FP8 in software there.
_FP8_KV_UNVERIFIED = ("gfx1100", "gfx1151")


def plan_warnings(
    best: Candidate, footprint: ModelFootprint, profile: Profile, limits: Limits, budget: Budget
) -> tuple[str, ...]:
    """Return what a person should know before starting this plan."""
    found = [memory_shortage(budget, limits.memory_bytes)]
    quantization = footprint.quantization
    ours = best.load.attention_backend == OUR_ATTENTION_BACKEND
    kernels = ["NL4"] if quantization is not None and quantization.method == "nl4" else []
    kernels += ["attention"] if ours else []
    if budget.gpus and kernels:
        found.append(
            f"Our {' and '.join(kernels)} kernels have not run on {budget.gpus[0].target or 'such a GPU'} here: their "
            "speed and the memory they take there are not measured."
        )
    if budget.gpus and not ours and best.kv_cache_dtype == "fp8" and budget.gpus[0].target in _FP8_KV_UNVERIFIED:
        found.append(
            f"FP8 KV cache on {budget.gpus[0].target}: the GPU has no FP8 instructions; vLLM does not refuse it, and "
            "nobody here has verified it. --kv-cache-dtype auto avoids it."
        )
    found.append(_slower_dtype(best, footprint, profile))
    if best.load.max_num_seqs > profile.max_num_seqs and not best.load.enforce_eager:
        found.append(
            f"max_num_seqs {best.load.max_num_seqs} is above the profile's {profile.max_num_seqs}, for which the "
            "graphs' memory was assumed: more graphs will be captured than are counted."
        )
    if not best.load.vision and limits.vision is None:
        found.append("Text only: prompts with images will be refused. --vision keeps them, at the price below.")
    if footprint.assumed:
        found.append("No shard was read: sizes follow from config.json and the policy; KV scales are assumed.")
    return tuple(text for text in found if text)


def _slower_dtype(best: Candidate, footprint: ModelFootprint, profile: Profile) -> str:
    """Return that the KV cache has the dtype that decodes slower with the backend chosen, and why; "" if not.

    A checkpoint that allows no FP8 is no choice to warn of.
    """
    used = (one.faster_kv_cache_dtype for one in profile.attention_backends if one.name == best.load.attention_backend)
    faster = next(used, None)
    fp8_possible = footprint.kv_scales is not None and footprint.quantization is not None
    if faster is None or faster.value == best.kv_cache_dtype or not fp8_possible:
        return ""
    return (
        f"KV cache in {dtype_name(best.kv_cache_dtype)}: {dtype_name(faster.value)} decodes faster with "
        f"{best.load.attention_backend} here ({faster.source})."
    )
