"""The vision tower's tensors: seeded random numbers in the right shapes and names. Plumbing only, it sees nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_PREFIX = "vision_model"


def vision_tensors(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Hub name -> bfloat16 tensor of the tower and its projector, for a Step-3.7 config.json."""
    vision, hidden = config["vision_config"], config["text_config"]["hidden_size"]
    width, inner = vision["width"], int(vision["width"] * vision["mlp_ratio"])
    patch, grid = vision["patch_size"], vision["image_size"] // vision["patch_size"]
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        inputs = torch.Size(shape[1:]).numel()
        return torch.randn(*shape, generator=generator) / math.sqrt(inputs)

    tensors = {
        "conv1.weight": noise(width, 3, patch, patch),
        "positional_embedding": noise(grid * grid, width),
        "vit_downsampler1.weight": noise(2 * width, width, 3, 3),
        "vit_downsampler1.bias": torch.zeros(2 * width),
        "vit_downsampler2.weight": noise(4 * width, 2 * width, 3, 3),
        "vit_downsampler2.bias": torch.zeros(4 * width),
    }
    norms = {"ln_pre": width}
    for i in range(vision["layers"]):
        block = f"transformer.resblocks.{i}"
        norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
        linears = {
            "attn.in_proj_": (3 * width, width),
            "attn.out_proj.": (width, width),
            "mlp.c_fc.": (inner, width),
            "mlp.c_proj.": (width, inner),
        }
        for name, (outputs, inputs) in linears.items():
            tensors[f"{block}.{name}weight"] = noise(outputs, inputs)
            tensors[f"{block}.{name}bias"] = torch.zeros(outputs)
        for name in ("ls_1", "ls_2"):
            tensors[f"{block}.{name}.gamma"] = torch.full((width,), float(vision["ls_init_value"]))
    for name, size in norms.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.ones(size), torch.zeros(size)
    named = {f"{_PREFIX}.{name}": tensor for name, tensor in tensors.items()}
    named["vit_large_projector.weight"] = noise(hidden, 4 * width)
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in named.items()}
