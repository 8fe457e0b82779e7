"""The checkpoint tensors that a vLLM model of Step-3.7 needs, by name (pure: no vLLM import).

vLLM skips a tensor that it does not know, and counts a fused parameter as loaded when one of its parts arrived, so a
misnamed ``k_proj`` would be served as garbage. Turning every parameter back into the hub's names finds both.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

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
    # A weight in the kernels' order, when a running server loads its checkpoint again.
    (re.compile(r"(?<=weight)_tiles$"), "_packed"),
    (re.compile(r"(?<=weight)_scales$"), "_scale"),
)

KV_SCALE_NAME = re.compile(r"^model\.layers\.(?P<layer>\d+)\.self_attn\.(?P<which>[kv])_proj\.(?P=which)_scale$")

# Old exports carry rotary frequencies; vLLM computes them and skips these.
_SKIPPED = re.compile(r"\.rotary_emb\.inv_freq$")

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_FLOAT_DTYPES = frozenset({"F16", "BF16", "F32"})

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


def part_of(tensor_name: str) -> str:
    """Part of the model a tensor belongs to: one decoder layer, the vision tower, or the rest."""
    layer = _LAYER.match(tensor_name)
    if layer:
        return f"layer {layer[1]}"
    return "vision" if tensor_name.startswith(("vision_model.", "vit_large_projector.")) else "rest"


def needed_tensors(parameter_names: Iterable[str], is_draft: bool) -> set[str]:
    """Hub names of all tensors that a model's parameters need.

    A drafter needs none outside of its layers: it shares the target's embedding, in whatever form the target has it.
    """
    names = {name for parameter in parameter_names for name in checkpoint_names(parameter)}
    return {name for name in names if part_of(name).startswith("layer")} if is_draft else names


def describe_mismatch(needed: set[str], dtypes: Mapping[str, str]) -> str | None:
    """One sentence about what is wrong with a checkpoint, or None when it holds just what the model needs.

    Args:
        needed: names that the model needs. Only the parts of the model that these lie in are looked at: the target
            ignores the MTP layers, the drafter the trunk, a text-only server the vision tower.
        dtypes: safetensors dtype of every tensor of the checkpoint, by name.
    """
    parts = {part_of(name) for name in needed}
    present = {name for name in dtypes if part_of(name) in parts and not _SKIPPED.search(name)}
    scales = {name for name in present if KV_SCALE_NAME.match(name)}
    # vLLM uses one of the two for both when the other is missing.
    missing = sorted(needed - present) or sorted({_other_scale(name) for name in scales} - scales)
    unknown = sorted(present - needed - scales)
    sentences = []
    if missing:
        sentences.append(f"missing tensor {_list(missing)}")
    if unknown:
        sentences.append(f"unknown tensor {_list(unknown)}")
    if missing and unknown:
        close = difflib.get_close_matches(missing[0], unknown, n=1, cutoff=0.8)
        if close:
            sentences.append(f"is {close[0]} meant to be {missing[0]}?")
    return "; ".join(sentences) or _wrong_dtype({name: dtypes[name] for name in present})


def _other_scale(name: str) -> str:
    """The V scale that belongs to a K scale, and the other way round."""
    old, new = ("k", "v") if name.endswith("k_scale") else ("v", "k")
    return name.replace(f".{old}_proj.{old}_scale", f".{new}_proj.{new}_scale")


def _wrong_dtype(dtypes: Mapping[str, str]) -> str | None:
    for name, dtype in sorted(dtypes.items()):
        wanted = {"weight_packed": frozenset({"U8"}), "weight_scale": frozenset({"F16"})}
        allowed = next((value for suffix, value in wanted.items() if name.endswith(suffix)), _FLOAT_DTYPES)
        if dtype not in allowed:
            return f"tensor {name} is {dtype}, it must be {' or '.join(sorted(allowed))}"
    return None


def _list(names: list[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
