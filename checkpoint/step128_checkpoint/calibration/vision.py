"""The vision tower of a Step-3.7 checkpoint, transformers' own, filled straight from the checkpoint's tensors.

What transformers does when it loads the whole model (conversion_mapping.py, "step3p7" and "step3p5_vision") is done
here by name: the fused in_proj becomes q, k and v, and the rows of q and k are reordered from pairs to halves, as its
rotary embedding wants them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from transformers.models.step3p7.configuration_step3p7 import Step3p7VisionConfig
from transformers.models.step3p7.image_processing_step3p7 import Step3p7ImageProcessor
from transformers.models.step3p7.modeling_step3p7 import Step3p7VisionModel, Step3p7VisionRotaryEmbedding

from step128_checkpoint.calibration.weights import load_weight
from step128_checkpoint.errors import CheckpointError, ConfigurationError
from step128_checkpoint.reader import Checkpoint

PROJECTOR = "vit_large_projector.weight"

_VIEWS_PER_BATCH = 4
# Module of the tower -> its tensor in the checkpoint. Below a block's prefix, and outside the blocks.
_BLOCK_NAMES = {
    "layernorm_before.": "ln_1.",
    "layernorm_after.": "ln_2.",
    "lambda_1": "ls_1.gamma",
    "lambda_2": "ls_2.gamma",
    "self_attn.out_proj.": "attn.out_proj.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
_OUTER_NAMES = {
    "embeddings.patch_embedding.": "conv1.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layernorm.": "ln_pre.",
    "downsampler1.": "vit_downsampler1.",
    "downsampler2.": "vit_downsampler2.",
}
# The quantizable linear layers of a block: module -> weight. q, k and v read the same input.
_LINEARS = {
    "self_attn.q_proj": "attn.in_proj_weight",
    "self_attn.out_proj": "attn.out_proj.weight",
    "mlp.fc1": "mlp.c_fc.weight",
    "mlp.fc2": "mlp.c_proj.weight",
}


def image_processor(config: dict[str, Any]) -> Step3p7ImageProcessor:
    """The image processor that a config.json describes; no preprocessor_config.json is needed.

    Its other sizes (crops of 504, at most 3024 pixels) are the architecture's, the same in every checkpoint.

    Raises:
        ConfigurationError: torchvision, which it works with, is missing.
    """
    vision = config.get("vision_config", {})
    side = int(vision.get("image_size", 728))
    try:
        processor = Step3p7ImageProcessor(size={"height": side, "width": side})
    except ImportError as error:
        raise ConfigurationError(
            "pictures need the package torchvision. Install it: pip install 'step128[checkpoint]'; or leave pictures "
            "out: `samples --no-images`"
        ) from error
    processor.vision_patch_size = int(vision.get("patch_size", processor.vision_patch_size))
    return processor


def open_image(path: Path) -> Image.Image:
    """Read one picture as RGB.

    Raises:
        CheckpointError: it is missing, cut short, or no picture.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise CheckpointError(f"{path}: not a picture that can be read: {error}") from error


class VisionTower:
    """The tower and its projector in memory, on one device; pictures go in, features come out.

    While ``observing`` is true, the inputs' second moments of every linear layer that a policy may quantize are summed.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str) -> None:
        """Read the tower's weights; the checkpoint's files are open.

        Raises:
            CheckpointError: the checkpoint has no vision tower, or a tensor of it is missing or misshapen.
        """
        vision = checkpoint.config.get("vision_config")
        if not isinstance(vision, dict):
            raise CheckpointError(f"{checkpoint.folder / 'config.json'}: no vision_config, but there are pictures")
        config = Step3p7VisionConfig(**{key: value for key, value in vision.items() if key != "model_type"})
        self._processor = image_processor(checkpoint.config)
        self._dtype, self._device = dtype, torch.device(device)
        with torch.device("meta"):
            tower = Step3p7VisionModel(config)
        _fill(tower, checkpoint, config.num_attention_heads, dtype, self._device)
        # Tables that no checkpoint stores.
        tower.rotary_emb = Step3p7VisionRotaryEmbedding(config).to(self._device)
        tower.embeddings.position_ids = torch.arange(tower.embeddings.num_positions, device=self._device)[None]
        self._tower = tower.eval().requires_grad_(False)
        weight = load_weight(checkpoint, PROJECTOR, dtype, self._device)
        self._projector = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta").requires_grad_(False)
        self._projector.weight = nn.Parameter(weight, requires_grad=False)
        self.observing = False
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}
        for module, name in vision_linears(self._tower):
            self._observe(module, name)
        self._observe(self._projector, PROJECTOR)

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Features [placeholders, H] of pictures in order: of each, its crops row by row, then the whole."""
        inputs = self._processor(images=list(images), return_tensors="pt")
        whole = self._project(inputs["pixel_values"])
        crops = self._project(inputs["pixel_values_local"]) if "pixel_values_local" in inputs else []
        parts: list[Tensor] = []
        used = 0
        for i, count in enumerate(int(n) for n in inputs["num_local_patches"]):
            parts += [*crops[used : used + count], whole[i]]
            used += count
        return torch.cat(parts)

    def moments(self) -> dict[str, Tensor]:
        """Weight name -> mean of x^2 over what was observed, float32 [K] on the CPU; empty if nothing was."""
        return {name: (total / self._rows[name]).float().cpu() for name, total in self._sums.items()}

    def _project(self, pixels: Tensor) -> list[Tensor]:
        """Features [n, H] of each view; ``pixels`` is [views, 3, side, side]."""
        features: list[Tensor] = []
        for start in range(0, len(pixels), _VIEWS_PER_BATCH):
            batch = pixels[start : start + _VIEWS_PER_BATCH].to(self._device, self._dtype)
            features += self._projector(self._tower(batch).last_hidden_state)
        return features

    def _observe(self, module: nn.Module, name: str) -> None:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self.observing:
                rows = inputs[0].flatten(0, -2)
                total = rows.float().square().sum(0).double()
                self._sums[name] = self._sums[name] + total if name in self._sums else total
                self._rows[name] = self._rows.get(name, 0) + len(rows)

        module.register_forward_pre_hook(add)


def block(number: int) -> str:
    """The checkpoint's name of one block of the tower."""
    return f"vision_model.transformer.resblocks.{number}"


def vision_linears(tower: Step3p7VisionModel) -> Iterator[tuple[nn.Module, str]]:
    """Yield a module that reads each quantizable weight's input, and the weight's name in the checkpoint."""
    for number, layer in enumerate(tower.layers):
        for module, weight in _LINEARS.items():
            yield layer.get_submodule(module), f"{block(number)}.{weight}"


def _fill(
    tower: Step3p7VisionModel, checkpoint: Checkpoint, heads: int, dtype: torch.dtype, device: torch.device
) -> None:
    state: dict[str, Tensor] = {}
    for name in tower.state_dict():
        if ".self_attn." in name and ".out_proj." not in name:
            continue
        state[name] = load_weight(checkpoint, stored_name(name), dtype, device)
    for number in range(len(tower.layers)):
        for kind in ("weight", "bias"):
            fused = load_weight(checkpoint, f"{block(number)}.attn.in_proj_{kind}", dtype, device)
            q, k, v = fused.chunk(3)
            for part, tensor in (("q", _pairs_to_halves(q, heads)), ("k", _pairs_to_halves(k, heads)), ("v", v)):
                state[f"layers.{number}.self_attn.{part}_proj.{kind}"] = tensor.clone()
    try:
        tower.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.folder}: the vision tower does not fit config.json: {error}") from error


def stored_name(name: str) -> str:
    """The checkpoint's name of a tensor of the tower, q, k and v excepted: they are one there."""
    prefix, names = "vision_model", _OUTER_NAMES
    if name.startswith("layers."):
        _, number, name = name.split(".", 2)
        prefix, names = block(int(number)), _BLOCK_NAMES
    ours = next(ours for ours in names if name.startswith(ours))
    return f"{prefix}.{names[ours]}{name.removeprefix(ours)}"


def _pairs_to_halves(tensor: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from x0 y0 x1 y1 ... to x0 x1 ... y0 y1 ...; [N, K] or [N]."""
    pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
