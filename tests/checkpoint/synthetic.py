"""Makes a checkpoint of the real model's names and shapes, with few layers and made-up weights, of many gigabytes."""

from __future__ import annotations

import copy
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from step128_checkpoint.dimensions import read_dimensions
from step128_checkpoint.expected import expected_weights
from step128_checkpoint.layout import OutputTensor, plan_layout
from step128_checkpoint.reader import Checkpoint

CONFIG = Path(__file__).parents[1] / "data/step-3.7-flash-240/config.json"
BLOCK_WEIGHTS = 1 << 25


def real_config(moe_layers: int) -> dict[str, Any]:
    """The hub's config.json, cut to its first sliding and full layers, all with experts; one vision block, no MTP."""
    config: dict[str, Any] = copy.deepcopy(json.loads(CONFIG.read_text()))
    text = config["text_config"]
    text["moe_num_experts"] = 288
    text["num_hidden_layers"] = moe_layers
    text["num_nextn_predict_layers"] = 0
    text["moe_layers_enum"] = ",".join(str(n) for n in range(moe_layers))
    for key in ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared"):
        text[key] = text[key][:moe_layers]
    config["vision_config"]["layers"] = 1
    return config


def write_synthetic(folder: Path, config: dict[str, Any]) -> int:
    """Write it; returns the bytes of its weights. Values are normal, their spread another for each tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"model.layers.{n}.x" for n in range(config["text_config"]["num_hidden_layers"])]
    names.append("vision_model.transformer.resblocks.0.x")
    shown = Checkpoint(folder, config, dict.fromkeys(names))  # type: ignore[arg-type]  only the names are looked at
    weights = expected_weights(read_dimensions(shown), 0)
    outputs = [OutputTensor(name, "BF16", shape, "model.safetensors") for name, shape in weights]
    layout = plan_layout(outputs, 5_000_000_000)
    normal = np.random.default_rng(128).standard_normal(BLOCK_WEIGHTS, dtype=np.float32)
    for file_name, header in layout.headers.items():
        with (folder / file_name).open("wb") as stream:
            stream.write(header)
            members = [o for o in outputs if layout.places[o.name].file_name == file_name]
            for output in sorted(members, key=lambda o: layout.places[o.name].offset_bytes):
                spread = np.float32(0.01 + 0.02 * (zlib.crc32(output.name.encode()) % 97) / 97)
                block = ((normal * spread).view(np.uint32) >> 16).astype("<u2")
                left = output.size_bytes // 2
                while left:
                    stream.write(block[: min(left, BLOCK_WEIGHTS)].data)
                    left -= min(left, BLOCK_WEIGHTS)
    (folder / "model.safetensors.index.json").write_text(layout.index_json())
    return sum(output.size_bytes for output in outputs)
