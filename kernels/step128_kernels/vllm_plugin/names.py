"""The checkpoint tensors that a vLLM model of Step-3.7 needs, by name (pure: no vLLM import).

vLLM skips a tensor that it does not know, and counts a fused parameter as loaded when one of its parts arrived, so a
misnamed ``k_proj`` would be served as garbage. Turning every parameter back into the hub's names finds both.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Parameters of a fused module stand for several tensors of the checkpoint.
_FUSED_PARTS = {
    ".qkv_proj.": (".q_proj.", ".k_proj.", ".v_proj."),
    ".gate_up_proj.": (".gate_proj.", ".up_proj."),
    ".moe.experts.routed_experts.w13_": (".moe.gate_proj.", ".moe.up_proj."),
    ".moe.experts.routed_experts.w2_": (".moe.down_proj.",),
}

_RENAMES = (
    (re.compile(r"^language_model\."), ""),
    (re.compile(r"\.moe\.share_expert\."), ".share_expert."),
    (re.compile(r"\.mtp_block\."), "."),
    (re.compile(r"\.shared_head\.head\."), ".transformer.shared_head.output."),
    (re.compile(r"\.shared_head\.norm\."), ".transformer.shared_head.norm."),
    (re.compile(r"\.attn\.qkv_proj\.(?=weight|bias)"), ".attn.in_proj_"),
    (re.compile(r"\.mlp\.fc1\."), ".mlp.c_fc."),
    (re.compile(r"\.mlp\.fc2\."), ".mlp.c_proj."),
)

# Tensors that a checkpoint may hold although a model does not ask for them: KV-cache scales (they belong to no weight),
# and both ends of the trunk, which with pipeline parallelism only the first or the last rank needs.
OPTIONAL_NAME = re.compile(
    r"\.self_attn\.([kv])_proj\.\1_scale$|^(model\.embed_tokens|model\.norm|lm_head)\.weight(_packed|_scale)?$"
)

# Attention-layer scales that vLLM creates; the checkpoint may carry the first two, under the projections' names.
_SCALE = re.compile(r"\.self_attn\.attn\.(k|v|q|prob)_scale$")


def checkpoint_names(parameter_name: str) -> tuple[str, ...]:
    """Hub names of the tensors that fill one vLLM parameter; empty for a KV-cache scale, which is optional."""
    if _SCALE.search(parameter_name):
        return ()
    name = parameter_name
    if name.startswith("vision_model."):
        fused: dict[str, tuple[str, ...]] = {}  # the tower's qkv is one tensor in the checkpoint too
    else:
        fused = _FUSED_PARTS
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    for infix, parts in fused.items():
        if infix in name:
            return tuple(name.replace(infix, part) for part in parts)
    return (name,)


def describe_mismatch(needed: Iterable[str], present: Iterable[str]) -> str | None:
    """One sentence about tensors that are missing or unknown, or None when the names agree.

    Args:
        needed: names that the model needs.
        present: names that the checkpoint holds, of the layers in question.
    """
    needed_set, present_set = set(needed), set(present)
    missing = sorted(needed_set - present_set)
    unknown = sorted(name for name in present_set - needed_set if not OPTIONAL_NAME.search(name))
    if not missing and not unknown:
        return None
    sentences = []
    if missing:
        sentences.append(f"missing tensor {_list(missing)}")
    if unknown:
        sentences.append(f"unknown tensor {_list(unknown)}")
    if missing and unknown:
        close = difflib.get_close_matches(missing[0], unknown, n=1, cutoff=0.8)
        if close:
            sentences.append(f"is {close[0]} meant to be {missing[0]}?")
    return "; ".join(sentences)


def _list(names: list[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
