"""The dimensions that config.json states, each checked before use. Keys and spelling are the hub's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.reader import Checkpoint

ARCHITECTURE = "Step3p7ForConditionalGeneration"
_LAYER_TYPES = ("full_attention", "sliding_attention")
_LAYER = re.compile(r"model\.layers\.([0-9]{1,9})\.")
_VISION_BLOCK = re.compile(r"vision_model\.transformer\.resblocks\.([0-9]+)\.")


@dataclass(frozen=True)
class VisionDimensions:
    """Of the vision tower: channels, blocks, channels inside a block's MLP, pixels a patch side, patches an image."""

    width: int
    layers: int
    mlp_width: int
    patch_size: int
    patches: int


@dataclass(frozen=True)
class Dimensions:
    """Of the language model. ``heads`` are the query heads of each layer, the MTP layers' (numbered last) included."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_mtp_layers: int
    vocab_size: int
    head_dim: int
    num_kv_heads: int
    heads: tuple[int, ...]
    moe_layers: frozenset[int]
    num_experts: int
    moe_intermediate_size: int
    shared_expert_size: int
    vision: VisionDimensions


def read_dimensions(checkpoint: Checkpoint) -> Dimensions:
    """Take the dimensions out of a checkpoint's config.json.

    Raises:
        CheckpointError: another architecture, a key that is missing or of a wrong type, or more layers than the
            tensors' names show (checked here, so that a wrong number costs neither time nor memory later).
    """
    config = _Section(checkpoint, "", checkpoint.config)
    if checkpoint.config.get("architectures") != [ARCHITECTURE]:
        raise config.error("architectures", f"[{ARCHITECTURE!r}] is needed")
    text, vision = config.section("text_config"), config.section("vision_config")
    layers, mtp_layers = text.count("num_hidden_layers"), text.count("num_nextn_predict_layers", minimum=0)
    _check_shown(checkpoint, text, "num_hidden_layers", _LAYER)
    types = text.values.get("layer_types")
    total = layers + mtp_layers
    if not isinstance(types, list) or len(types) < total or any(kind not in _LAYER_TYPES for kind in types[:total]):
        raise text.error("layer_types", f"one of {', '.join(_LAYER_TYPES)} for each of {total} layers is needed")
    heads = {
        "full_attention": text.count("num_attention_heads"),
        "sliding_attention": text.section("attention_other_setting").count("num_attention_heads"),
    }
    if "sliding_window" in text.values:
        text.count("sliding_window")
    num_experts = text.count("moe_num_experts")
    if "moe_top_k" in text.values and text.count("moe_top_k") > num_experts:
        raise text.error("moe_top_k", f"a token cannot have more experts than there are, {num_experts}")
    return Dimensions(
        hidden_size=text.count("hidden_size"),
        intermediate_size=text.count("intermediate_size"),
        num_hidden_layers=layers,
        num_mtp_layers=mtp_layers,
        vocab_size=text.count("vocab_size"),
        head_dim=text.count("head_dim"),
        num_kv_heads=text.count("num_attention_groups"),
        heads=tuple(heads[kind] for kind in types[:total]),
        moe_layers=_moe_layers(text, layers),
        num_experts=num_experts,
        moe_intermediate_size=text.count("moe_intermediate_size"),
        shared_expert_size=text.count("share_expert_dim"),
        vision=_vision(checkpoint, vision),
    )


def layer_of(tensor_name: str) -> int | None:
    """The decoder layer that a tensor belongs to, or None."""
    match = _LAYER.match(tensor_name)
    return int(match[1]) if match else None


class _Section:
    """One object of config.json; every complaint names the file, the key and what is there."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, values: dict[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._prefix = prefix
        self.values = values

    def error(self, key: str, needed: str) -> CheckpointError:
        found = repr(self.values[key]) if key in self.values else "missing"
        found = found if len(found) < 100 else f"{found[:100]}..."
        return CheckpointError(f"{self._checkpoint.folder / 'config.json'}: {self._prefix}{key} is {found}; {needed}")

    def section(self, key: str) -> _Section:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "an object is needed")
        return _Section(self._checkpoint, f"{self._prefix}{key}.", value)

    def count(self, key: str, minimum: int = 1) -> int:
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(key, f"a whole number of at least {minimum} is needed")
        return value


def _check_shown(checkpoint: Checkpoint, section: _Section, key: str, pattern: re.Pattern[str]) -> None:
    shown = {match[1] for name in checkpoint.tensors if (match := pattern.match(name))}
    if section.count(key) > len(shown):
        raise section.error(key, f"the tensors' names show {len(shown)} layers")


def _moe_layers(text: _Section, layers: int) -> frozenset[int]:
    value = text.values.get("moe_layers_enum")
    needed = f'layers from 0 to {layers - 1}, written like "3,4,5", are needed'
    try:
        found = frozenset(int(part) for part in str(value).split(",")) if value else frozenset()
    except ValueError:
        raise text.error("moe_layers_enum", needed) from None
    if any(not 0 <= layer < layers for layer in found):
        raise text.error("moe_layers_enum", needed)
    return found


def _vision(checkpoint: Checkpoint, vision: _Section) -> VisionDimensions:
    _check_shown(checkpoint, vision, "layers", _VISION_BLOCK)
    ratio = vision.values.get("mlp_ratio")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1000:
        raise vision.error("mlp_ratio", "a positive number is needed")
    width, patch_size = vision.count("width"), vision.count("patch_size")
    return VisionDimensions(
        width=width,
        layers=vision.count("layers"),
        mlp_width=int(width * ratio),
        patch_size=patch_size,
        patches=(vision.count("image_size") // patch_size) ** 2,
    )
