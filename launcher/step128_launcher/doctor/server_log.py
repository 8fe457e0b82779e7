"""What vLLM chose at its last start, by its own log: the kernels of attention, of the image encoder and of experts.

The texts are those of vLLM 0.32: platforms/rocm.py, platforms/cuda.py, platforms/interface.py,
model_executor/layers/attention/mm_encoder_attention.py and model_executor/layers/fused_moe/fused_moe.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from step128_launcher.doctor.attention import CONSUMER
from step128_launcher.doctor.context import Context
from step128_launcher.doctor.finding import Finding, failed, passed, skipped, warned
from step128_launcher.user_folders import user_folder

NO_LOG = "no vllm.log of an earlier start is known"
_NAME = r"(?:AttentionBackendEnum\.)?([A-Z][A-Z0-9_]+)"
_ATTENTION = re.compile(
    rf"Using {_NAME} (?:attention )?backend(?: out of potential backends| \(selected via --attention-backend\)|\.\s*$)"
    rf"|Overriding with {_NAME} out of potential backends"
)
_VISION = re.compile(
    rf"Using (?:default )?backend {_NAME} for vit attention|Using {_NAME} for MMEncoderAttention"
    r"|Using (Torch SDPA) backend for ViT model"
)
_DEFAULT_MOE = re.compile(r"Using default MoE config\..*?Config file not found at (.+)$")
_START = "vLLM API server version"


def find_log(environment: Mapping[str, str]) -> Path | None:
    """Return the newest vllm.log below the default state folders (one for each port), or None."""
    found = {}
    for path in user_folder("XDG_STATE_HOME", environment).glob("*/vllm.log"):
        try:
            found[path] = path.stat().st_mtime
        except OSError:
            continue  # removed between the two looks, or another user's
    return max(found, key=lambda path: found[path], default=None)


def check_logged_attention(context: Context) -> Finding:
    """vLLM may resolve another backend than was asked for, and ROCM_ATTN is several times slower on these GPUs."""
    name = "log-attention"
    lines = _last_start(context)
    if lines is None:
        return skipped(name, NO_LOG)
    chosen = _found(_ATTENTION, lines)
    if not chosen:
        return skipped(name, f"{context.log} names no attention backend")
    shown = f"{', '.join(chosen)}, by {context.log}"
    targets = context.targets(*CONSUMER)
    if "ROCM_ATTN" in chosen and targets:
        return failed(
            name,
            f"{shown}, on {', '.join(targets)}: decoding is several times slower with it (ROCm/vllm#994)",
            "step128 serve --attention-backend CUSTOM; VLLM_ATTENTION_BACKEND is ignored by vLLM 0.32",
        )
    named = context.profile.attention_backends if context.profile else ()
    if targets and named and chosen != [named[0].name]:
        return warned(
            name,
            f"{shown}, on {', '.join(targets)}; profile {context.profile.name if context.profile else ''} names "
            f"{named[0].name} first",
            "If you did not ask for it, serve without --attention-backend: the first of the profile is then named.",
        )
    return passed(name, shown)


def check_logged_vision(context: Context) -> Finding:
    """The image encoder on torch's own attention gave NaN to others on gfx1x."""
    name = "log-vision-attention"
    lines = _last_start(context)
    if lines is None:
        return skipped(name, NO_LOG)
    chosen = _found(_VISION, lines)
    if not chosen:
        return skipped(name, f"{context.log} names no backend of the image encoder")
    shown = f"{', '.join(chosen)}, by {context.log}"
    if {"TORCH_SDPA", "Torch SDPA"} & set(chosen) and context.targets(*CONSUMER):
        return warned(name, shown, "Add --mm-encoder-attn-backend TRITON_ATTN to vllm.arguments, or serve text only.")
    return passed(name, shown)


def check_logged_experts(context: Context) -> Finding:
    """A tuned configuration that exists under another name is not found, and only this line of the log tells."""
    name = "log-experts"
    lines = _last_start(context)
    if lines is None:
        return skipped(name, NO_LOG)
    files = _found(_DEFAULT_MOE, lines)
    if not files:
        return passed(name, f"{context.log} does not say 'Using default MoE config'")
    return warned(
        name,
        f"vLLM took its default tiles for the experts; it looked for {files[-1]}",
        "Name the tuned file exactly so, in a folder that VLLM_TUNED_CONFIG_FOLDER names; or tune one.",
    )


def _last_start(context: Context) -> list[str] | None:
    """Return the log's lines since its last start, without colours; None without a log."""
    if context.log is None:
        return None
    lines: list[str] = []
    try:
        with context.log.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if _START in line:
                    lines = []
                if "Using " in line or "Overriding with " in line:
                    lines.append(re.sub(r"\x1b\[[0-9;]*m", "", line.rstrip("\n")))
    except OSError:
        return None
    return lines


def _found(pattern: re.Pattern[str], lines: list[str]) -> list[str]:
    """Return what the pattern's groups caught, each once."""
    matches = [match for line in lines if (match := pattern.search(line))]
    return list(dict.fromkeys(next(group for group in match.groups() if group) for match in matches))
