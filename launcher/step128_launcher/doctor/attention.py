"""Settings that pick slow or broken kernels on Radeon and Ryzen GPUs (gfx10, gfx11, gfx12)."""

from step128_launcher.doctor.context import Context, is_on
from step128_launcher.doctor.finding import Finding, failed, passed, skipped, warned

CONSUMER = ("gfx10", "gfx11", "gfx12")
_NO_GPU = "no usable gfx10, gfx11 or gfx12 GPU"


def check_backend(context: Context) -> Finding:
    """vLLM's first choice, ROCM_ATTN, decodes about 7 times slower on these GPUs (ROCm/vllm#994)."""
    name = "attention-backend"
    if not context.targets(*CONSUMER):
        return skipped(name, _NO_GPU)
    if "VLLM_ATTENTION_BACKEND" in context.environment:
        return warned(
            name,
            f"VLLM_ATTENTION_BACKEND={context.environment['VLLM_ATTENTION_BACKEND']} is set; vLLM 0.32 ignores it",
            "Unset it; use `step128 serve --attention-backend …`.",
        )
    if context.profile is None:
        return skipped(name, "no profile is chosen; the profile names the backend")
    backends = [backend.name for backend in context.profile.attention_backends]
    if not backends or backends[0] == "ROCM_ATTN":  # in order of preference
        return failed(
            name,
            f"profile {context.profile.name} names {', '.join(backends) or 'no backend'}; vLLM itself takes ROCM_ATTN",
            "Put CUSTOM, our kernels, first in vllm.attention_backends of the profile.",
        )
    return passed(name, f"profile {context.profile.name}: {', '.join(backends)}")


def check_vision_backend(context: Context) -> Finding:
    """The image encoder on torch's own attention gave NaN, answers of endless "!", to others on R9700."""
    name = "vision-attention"
    if not context.targets(*CONSUMER):
        return skipped(name, _NO_GPU)
    if context.profile is None:
        return skipped(name, "no profile is chosen; the profile names the backend")
    flag, arguments = "--mm-encoder-attn-backend", context.profile.arguments
    values = [arguments[at + 1] for at, word in enumerate(arguments[:-1]) if word == flag]
    values += [word.partition("=")[2] for word in arguments if word.startswith(flag + "=")]
    if values and values[-1] != "TORCH_SDPA":
        return passed(name, f"profile {context.profile.name}: {flag} {values[-1]}")
    return warned(
        name,
        f"the image encoder would use {values[-1] if values else 'what vLLM chooses, which may be TORCH_SDPA'}",
        f"Add {flag} TRITON_ATTN to vllm.arguments of the profile, or serve text only (--no-vision).",
    )


def check_aiter(context: Context) -> Finding:
    """AITER has no kernels for these GPUs, and its MoE lacks this model's activation (SwiGLU with a limit)."""
    name = "aiter"
    targets = context.targets(*CONSUMER)
    if not targets:
        return skipped(name, _NO_GPU)
    value, origin = context.setting("VLLM_ROCM_USE_AITER")
    if is_on(value):
        return failed(
            name,
            f"VLLM_ROCM_USE_AITER={value} (set by {origin}) on {', '.join(targets)}: AITER is for gfx942 and gfx950",
            "unset VLLM_ROCM_USE_AITER",
        )
    return passed(name, "off" if value is None else f"VLLM_ROCM_USE_AITER={value}, set by {origin}")


def check_override(context: Context) -> Finding:
    """HSA_OVERRIDE_GFX_VERSION makes every library take the GPU for another one."""
    name = "gfx-override"
    if not context.amd:
        return skipped(name, "no usable AMD GPU")
    value, origin = context.setting("HSA_OVERRIDE_GFX_VERSION")
    if value is None:
        return passed(name, "HSA_OVERRIDE_GFX_VERSION is not set")
    targets = ", ".join(sorted({gpu.target or "?" for gpu in context.amd}))
    return failed(
        name,
        f"HSA_OVERRIDE_GFX_VERSION={value} (set by {origin}) on {targets}: kernels for another GPU would run or fail",
        "unset HSA_OVERRIDE_GFX_VERSION, and use an image built for this target",
    )
