"""A small folder with the names, types and files of the hub's Step-3.7 checkpoint, random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HIDDEN, LAYERS, MTP, EXPERTS, INTERMEDIATE, VOCABULARY, VISION = 64, 3, 1, 4, 32, 96, 32

MakeCheckpoint = Callable[..., Path]


def bfloat16_bytes(values: np.ndarray) -> bytes:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()


def write_safetensors(path: Path, entries: dict[str, tuple[str, list[int], bytes]]) -> None:
    """A second, plain writer of the format, so that ours is not its own witness."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in entries.values()))


def step_tensors(hidden: int = HIDDEN, experts: int = EXPERTS) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a text model with MTP and one vision block."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (VOCABULARY, hidden),
        "vision_model.conv1.weight": (VISION, 3, 14, 14),
        "vit_large_projector.weight": (hidden, VISION),
    }
    for layer in range(LAYERS + MTP):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (hidden, hidden)
        shapes[f"{prefix}.self_attn.g_proj.weight"] = (2, hidden)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        dense = layer == 0 or layer >= LAYERS
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (hidden, INTERMEDIATE) if name == "down_proj" else (INTERMEDIATE, hidden)
            if dense:
                shapes[f"{prefix}.mlp.{name}.weight"] = shape
            else:
                shapes[f"{prefix}.moe.{name}.weight"] = (experts, *shape)
                shapes[f"{prefix}.share_expert.{name}.weight"] = shape
        if not dense:
            shapes[f"{prefix}.moe.gate.weight"] = (experts, hidden)
        if layer >= LAYERS:
            shapes[f"{prefix}.eh_proj.weight"] = (hidden, 2 * hidden)
            shapes[f"{prefix}.transformer.shared_head.output.weight"] = (VOCABULARY, hidden)
    block = "vision_model.transformer.resblocks.0"
    shapes[f"{block}.attn.in_proj_weight"] = (3 * VISION, VISION)
    shapes[f"{block}.attn.in_proj_bias"] = (3 * VISION,)
    shapes[f"{block}.attn.out_proj.weight"] = (VISION, VISION)
    shapes[f"{block}.mlp.c_fc.weight"] = (2 * VISION, VISION)
    shapes[f"{block}.mlp.c_proj.weight"] = (VISION, 2 * VISION)
    return shapes


def step_config() -> dict[str, Any]:
    text = {
        "num_hidden_layers": LAYERS,
        "num_nextn_predict_layers": MTP,
        "moe_layers_enum": "1,2",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "torch_dtype": "bfloat16",
        "vision_config": {"layers": 1},
        "text_config": text,
    }


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Factory: writes a bf16 checkpoint in two shards and a file of KV scales; ``replace`` swaps values by name."""

    def make(
        name: str = "bf16",
        shapes: dict[str, tuple[int, ...]] | None = None,
        replace: dict[str, np.ndarray] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        random = np.random.default_rng(0)
        entries: dict[str, tuple[str, list[int], bytes]] = {}
        for tensor, shape in (shapes or step_tensors()).items():
            values = (replace or {}).get(tensor)
            if values is None:
                values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.05)
            entries[tensor] = ("BF16", list(values.shape), bfloat16_bytes(values))
        names = list(entries)
        kv_names = [f"model.layers.{i}.self_attn.{p}_proj.{p}_scale" for i in range(LAYERS + MTP) for p in "kv"]
        for i, kv_name in enumerate(kv_names):
            data = np.asarray([0.01 * (i + 1)], dtype="<f4").tobytes()
            entries[kv_name] = ("F32", [1], data)
        files = {
            "model-00001-of-00002.safetensors": names[::2],
            "model-00002-of-00002.safetensors": names[1::2],
            "model-kvscales.safetensors": kv_names,
        }
        for file_name, members in files.items():
            write_safetensors(folder / file_name, {n: entries[n] for n in members})
        weight_map = {n: file_name for file_name, members in files.items() for n in members}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (folder / "config.json").write_text(json.dumps(step_config()))
        (folder / "tokenizer.json").write_text('{"made": "up"}')
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "tiny_report.json").write_text("{}")
        (folder / ".cache").mkdir()
        (folder / ".cache" / "lock").write_text("")
        return folder

    return make
