"""The dimensions of a Step-3.7 model, read and checked from the checkpoint's config.json.

Spelling of the keys: the hub's config.json of Step-3.7-Flash (text part nested in `text_config`, lists with one entry a
layer that also cover the MTP layers).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step128_launcher.errors import CheckpointError, ExitCode, LauncherError
from step128_launcher.model.json_file import read_json

ARCHITECTURE = "Step3p7ForConditionalGeneration"
FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"
# Above these a figure is a mistake, and sizes made from it would be too: no dimension of a tensor, layers or experts.
_MOST, _MOST_LAYERS, _MOST_EXPERTS = 2**31, 2**12, 2**16


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower (perception encoder): sizes in channels, patches a tile and layers."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int
    patches: int


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of the trunk, the MTP layers and the vision tower. `layer_types` covers trunk and MTP layers."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_mtp_layers: int
    vocab_size: int
    num_attention_heads: int
    num_sliding_attention_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int
    layer_types: tuple[str, ...]
    full_rotary_dim: int
    sliding_rotary_dim: int
    max_position_embeddings: int
    moe_layers: frozenset[int]
    num_experts: int
    experts_per_token: int
    moe_intermediate_size: int
    shared_expert_size: int
    dtype: str
    vision: VisionConfig
    quantization_config: dict[str, Any] | None

    @property
    def main_layers(self) -> range:
        """Indices of the trunk's decoder layers."""
        return range(self.num_hidden_layers)

    @property
    def mtp_layer_indices(self) -> range:
        """Indices of the multi-token-prediction layers, which follow the trunk's."""
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_mtp_layers)

    def attention_heads(self, layer: int) -> int:
        """Return the query heads of one layer; sliding layers have their own count."""
        full = self.layer_types[layer] == FULL_ATTENTION
        return self.num_attention_heads if full else self.num_sliding_attention_heads


def read_model_config(folder: Path) -> ModelConfig:
    """Read `folder`/config.json.

    Raises:
        LauncherError: 66, if the folder or the file does not exist; 5, if the file may not be read.
        CheckpointError: if the file is no JSON, is of another architecture, or a key is missing or contradicts another.

    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise LauncherError(
            ExitCode.INPUT_NOT_FOUND,
            f"The model folder {folder} does not exist.",
            "MODEL is a local checkpoint folder; download or make one first.",
        )
    try:
        document = read_json(path)
    except FileNotFoundError as error:
        raise LauncherError(
            ExitCode.INPUT_NOT_FOUND,
            f"{path} does not exist.",
            "MODEL must be a Hugging Face checkpoint folder: config.json, tokenizer files and *.safetensors.",
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return _Reader(path, document).model()


class _Reader:
    """Takes typed values out of config.json; every complaint names the file and the key."""

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path = path
        self.document = document

    def bad(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def section(self, key: str) -> dict[str, Any]:
        value = self.document.get(key)
        if not isinstance(value, dict):
            raise self.bad(f"the section {key!r} is missing.")
        return value

    def integer(self, section: dict[str, Any], key: str, name: str, minimum: int = 1, maximum: int = _MOST) -> int:
        value = section.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.bad(f"{name}{key} must be a whole number of at least {minimum}, found {value!r}.")
        if value > maximum:
            raise self.bad(f"{name}{key} must be at most {maximum}, found {value!r}.")
        return value

    def model(self) -> ModelConfig:
        architectures = self.document.get("architectures")
        if architectures != [ARCHITECTURE]:
            raise self.bad(f"architectures is {architectures!r}; this release serves {ARCHITECTURE} only.")
        text = self.section("text_config")

        def get(key: str, minimum: int = 1, maximum: int = _MOST) -> int:
            return self.integer(text, key, "text_config.", minimum, maximum)

        layers = get("num_hidden_layers", maximum=_MOST_LAYERS)
        mtp_layers = get("num_nextn_predict_layers", 0, _MOST_LAYERS)
        total = layers + mtp_layers
        layer_types = self.per_layer(text, "layer_types", total)
        unknown = [kind for kind in layer_types if kind not in (FULL_ATTENTION, SLIDING_ATTENTION)]
        if unknown:
            raise self.bad(
                f"text_config.layer_types holds {unknown[0]!r}; known: {FULL_ATTENTION}, {SLIDING_ATTENTION}."
            )
        sliding = text.get("attention_other_setting")
        if not isinstance(sliding, dict):
            raise self.bad("text_config.attention_other_setting is missing (the sliding layers' head count).")
        heads, kv_heads = get("num_attention_heads"), get("num_attention_groups")
        sliding_heads = self.integer(sliding, "num_attention_heads", "text_config.attention_other_setting.")
        for key, count in (("", heads), ("attention_other_setting.", sliding_heads)):
            if count % kv_heads:
                raise self.bad(
                    f"text_config.{key}num_attention_heads must be a multiple of num_attention_groups ({kv_heads}), "
                    f"found {count}."
                )
        experts, top_k = get("moe_num_experts", maximum=_MOST_EXPERTS), get("moe_top_k")
        if top_k > experts:
            raise self.bad(f"text_config.moe_top_k must be at most moe_num_experts ({experts}), found {top_k}.")
        head_dim = get("head_dim")
        rotary = self.rotary_dims(text, layer_types, head_dim)
        quantization = self.document.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict):
            raise self.bad("quantization_config must be an object.")
        return ModelConfig(
            hidden_size=get("hidden_size"),
            intermediate_size=get("intermediate_size"),
            num_hidden_layers=layers,
            num_mtp_layers=mtp_layers,
            vocab_size=get("vocab_size"),
            num_attention_heads=heads,
            num_sliding_attention_heads=sliding_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            sliding_window=get("sliding_window"),
            layer_types=tuple(layer_types),
            full_rotary_dim=rotary[0],
            sliding_rotary_dim=rotary[1],
            max_position_embeddings=get("max_position_embeddings"),
            moe_layers=self.moe_layers(text, layers),
            num_experts=experts,
            experts_per_token=top_k,
            moe_intermediate_size=get("moe_intermediate_size"),
            shared_expert_size=get("share_expert_dim"),
            dtype=str(self.document.get("torch_dtype") or self.document.get("dtype") or "bfloat16"),
            vision=self.vision(),
            quantization_config=quantization,
        )

    def per_layer(self, text: dict[str, Any], key: str, total: int) -> list[Any]:
        """Return a list with one entry for each trunk and MTP layer."""
        value = text.get(key)
        if not isinstance(value, list) or len(value) < total:
            found = f"{len(value)} entries" if isinstance(value, list) else repr(value)
            raise self.bad(
                f"text_config.{key} must have one entry for each of the {total} layers "
                f"(num_hidden_layers + num_nextn_predict_layers), found {found}."
            )
        return value[:total]

    def rotary_dims(self, text: dict[str, Any], layer_types: list[Any], head_dim: int) -> tuple[int, int]:
        """Return the rotated dimensions of a head in full and in sliding layers; 0 where there is no such layer."""
        factors = self.per_layer(text, "partial_rotary_factors", len(layer_types))
        dims = {FULL_ATTENTION: 0, SLIDING_ATTENTION: 0}
        for kind, factor in zip(layer_types, factors, strict=True):
            if not isinstance(factor, int | float) or not 0 < factor <= 1:
                raise self.bad(f"text_config.partial_rotary_factors holds {factor!r}.")
            dims[kind] = max(dims[kind], int(head_dim * factor))
        return dims[FULL_ATTENTION], dims[SLIDING_ATTENTION]

    def moe_layers(self, text: dict[str, Any], layers: int) -> frozenset[int]:
        """Return the trunk layers with experts; the hub writes them as one text, "3,4,5"."""
        value = text.get("moe_layers_enum")
        try:
            found = frozenset(int(part) for part in str(value).split(",")) if value else frozenset()
        except ValueError as error:
            raise self.bad(f'text_config.moe_layers_enum must look like "3,4,5", found {value!r}.') from error
        if any(not 0 <= layer < layers for layer in found):
            raise self.bad(f"text_config.moe_layers_enum names layers outside 0 to {layers - 1}: {value!r}.")
        return found

    def vision(self) -> VisionConfig:
        section = self.section("vision_config")

        def get(key: str, maximum: int = _MOST) -> int:
            return self.integer(section, key, "vision_config.", maximum=maximum)

        ratio = section.get("mlp_ratio")
        if not isinstance(ratio, int | float) or not (math.isfinite(ratio) and ratio > 0):
            raise self.bad(f"vision_config.mlp_ratio must be a positive number, found {ratio!r}.")
        width, patch = get("width"), get("patch_size")
        if width * ratio > _MOST:
            raise self.bad(f"vision_config.mlp_ratio makes layers wider than {_MOST}, found {ratio!r}.")
        return VisionConfig(
            width=width,
            layers=get("layers", _MOST_LAYERS),
            heads=get("heads"),
            mlp_width=int(width * ratio),
            patch_size=patch,
            patches=(get("image_size") // patch) ** 2,
        )
