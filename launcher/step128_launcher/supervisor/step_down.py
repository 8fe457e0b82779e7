"""What a leaner plan gives up, in words."""

from step128_launcher.planning.plan import Plan

# Plan field -> words for it; the rest of a plan follows from these.
_FIELDS = {
    "max_model_len": "context",
    "num_speculative_tokens": "MTP depth",
    "kv_cache_dtype": "KV",
    "max_num_seqs": "requests at once",
    "max_num_batched_tokens": "tokens a step",
    "vision": "vision",
    "tensor_parallel_size": "tensor parallel",
    "enforce_eager": "eager",
    "gpu_memory_utilization": "GPU memory utilization",
}


def given_up(plan: Plan, leaner: Plan) -> str:
    """Return the settings that differ, for example "context 204800 -> 131072, MTP depth 3 -> 1"."""
    changes = [
        f"{words} {getattr(plan, name)} -> {getattr(leaner, name)}"
        for name, words in _FIELDS.items()
        if getattr(plan, name) != getattr(leaner, name)
    ]
    return ", ".join(changes) or "the same settings"


def in_short(plan: Plan) -> str:
    """Return the settings by which a person tells plans apart."""
    return (
        f"context {plan.max_model_len}, MTP {plan.num_speculative_tokens}, KV {plan.kv_cache_dtype}, "
        f"{plan.max_num_seqs} requests at once"
    )
