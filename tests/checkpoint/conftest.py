"""A small folder with the names, types and files of the hub's Step-3.7 checkpoint, random weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from step128_checkpoint.calibration.options import CalibrationOptions

LAYERS, MTP = 3, 1

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


def step_config(**text: Any) -> dict[str, Any]:
    """config.json of a small model in the hub's spelling; ``text`` replaces entries of text_config."""
    return {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "torch_dtype": "bfloat16",
        "vision_config": {"width": 32, "layers": 1, "mlp_ratio": 2.0, "patch_size": 14, "image_size": 28},
        "text_config": {
            "num_hidden_layers": LAYERS,
            "num_nextn_predict_layers": MTP,
            "moe_layers_enum": "1,2",
            "layer_types": ["full_attention"] + ["sliding_attention"] * 3,
            "hidden_size": 64,
            "intermediate_size": 32,
            "vocab_size": 96,
            "head_dim": 16,
            "num_attention_heads": 2,
            "attention_other_setting": {"num_attention_heads": 4},
            "num_attention_groups": 1,
            "moe_num_experts": 4,
            "moe_intermediate_size": 32,
            "share_expert_dim": 16,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            **text,
        },
    }


def step_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of the model that ``config`` describes, written down a second time."""
    text = config["text_config"]
    hidden, vocabulary, experts = text["hidden_size"], text["vocab_size"], text["moe_num_experts"]
    trunk, head_dim = text["num_hidden_layers"], text["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
        "vision_model.conv1.weight": (32, 3, 14, 14),
        "vision_model.positional_embedding": (4, 32),
        "vision_model.ln_pre.weight": (32,),
        "vision_model.ln_pre.bias": (32,),
        "vision_model.vit_downsampler1.weight": (64, 32, 3, 3),
        "vision_model.vit_downsampler1.bias": (64,),
        "vision_model.vit_downsampler2.weight": (128, 64, 3, 3),
        "vision_model.vit_downsampler2.bias": (128,),
        "vit_large_projector.weight": (hidden, 128),
    }

    def mlp(prefix: str, inner: int, *outer: int) -> None:
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            shapes[f"{prefix}.{name}_proj.weight"] = (*outer, *shape)

    for layer in range(trunk + text["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}"
        other = text["layer_types"][layer] == "sliding_attention"
        heads = (text["attention_other_setting"] if other else text)["num_attention_heads"]
        kv = text["num_attention_groups"] * head_dim
        for name, rows in (("q", heads * head_dim), ("k", kv), ("v", kv), ("g", heads)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, heads * head_dim)
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["enorm", "hnorm", "transformer.shared_head.norm"] if layer >= trunk else []
        shapes |= {f"{prefix}.{name}.weight": (hidden,) for name in norms}
        shapes |= {f"{prefix}.self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
        if str(layer) in text["moe_layers_enum"].split(","):
            mlp(f"{prefix}.moe", text["moe_intermediate_size"], experts)
            mlp(f"{prefix}.share_expert", text["share_expert_dim"])
            shapes[f"{prefix}.moe.gate.weight"] = (experts, hidden)
            shapes[f"{prefix}.moe.router_bias"] = (experts,)
        else:
            mlp(f"{prefix}.mlp", text["intermediate_size"])
        if layer >= trunk:
            shapes[f"{prefix}.eh_proj.weight"] = (hidden, 2 * hidden)
            shapes[f"{prefix}.transformer.shared_head.output.weight"] = (vocabulary, hidden)
    block = "vision_model.transformer.resblocks.0"
    shapes |= {
        f"{block}.attn.in_proj_weight": (96, 32),
        f"{block}.attn.in_proj_bias": (96,),
        f"{block}.attn.out_proj.weight": (32, 32),
        f"{block}.mlp.c_fc.weight": (64, 32),
        f"{block}.mlp.c_fc.bias": (64,),
        f"{block}.mlp.c_proj.weight": (32, 64),
    }
    small = ["attn.out_proj.bias", "mlp.c_proj.bias", "ls_1.gamma", "ls_2.gamma"]
    small += [f"ln_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    return shapes | {f"{block}.{name}": (32,) for name in small}


@pytest.fixture
def step_model() -> Callable[..., tuple[dict[str, Any], dict[str, tuple[int, ...]]]]:
    """Factory: config.json and tensor shapes of a small model, with entries of text_config replaced."""

    def model(**text: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        config = step_config(**text)
        return config, step_tensors(config)

    return model


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Factory: writes a bf16 checkpoint in two shards and a file of KV scales.

    ``replace`` swaps values by name, ``drop`` leaves out the tensors it matches, ``text`` replaces config entries.
    """

    def make(
        name: str = "bf16",
        shapes: dict[str, tuple[int, ...]] | None = None,
        replace: dict[str, np.ndarray] | None = None,
        drop: str = "nothing",
        **text: Any,
    ) -> Path:
        config = step_config(**text)
        folder = tmp_path / name
        folder.mkdir()
        random = np.random.default_rng(0)
        entries: dict[str, tuple[str, list[int], bytes]] = {}
        for tensor, shape in (shapes or step_tensors(config)).items():
            values = (replace or {}).get(tensor)
            if values is None:
                values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.05)
            entries[tensor] = ("BF16", list(values.shape), bfloat16_bytes(values))
        entries = {name: entry for name, entry in entries.items() if not re.search(drop, name)}
        names = list(entries)
        kv_names = [f"model.layers.{i}.self_attn.{p}_proj.{p}_scale" for i in range(LAYERS + MTP) for p in "kv"]
        kv_names = [kv_name for kv_name in kv_names if not re.search(drop, kv_name)]
        for i, kv_name in enumerate(kv_names):
            data = np.asarray([0.01 * (i + 1)], dtype="<f4").tobytes()
            entries[kv_name] = ("F32", [1], data)
        files = {
            "model-00001-of-00002.safetensors": names[::2],
            "model-00002-of-00002.safetensors": names[1::2],
            **({"model-kvscales.safetensors": kv_names} if kv_names else {}),
        }
        for file_name, members in files.items():
            write_safetensors(folder / file_name, {n: entries[n] for n in members})
        weight_map = {n: file_name for file_name, members in files.items() for n in members}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text('{"made": "up"}')
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "tiny_report.json").write_text("{}")
        (folder / ".cache").mkdir()
        (folder / ".cache" / "lock").write_text("")
        return folder

    return make


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a checkpoint has it: tokenizer, chat template and config.json, no weights."""
    from step128_checkpoint.tiny.corpus import dialogue_texts
    from step128_checkpoint.tiny.tokenizer import special_ids, tokenizer_files, train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    trained = train_tokenizer(dialogue_texts(2000, seed=0))
    for name, text in tokenizer_files(trained).items():
        (folder / name).write_text(text)
    config = {"image_token_id": special_ids(trained).image, "vision_config": {"image_size": 728, "patch_size": 14}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch on one thread, here and in processes that the test starts: the same sums in the same order."""
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A sample set of text for the tiny model, of all kinds of length."""
    from sample_sets import tiny_samples

    return tiny_samples(tiny, tmp_path_factory.mktemp("samples") / "set")


@pytest.fixture
def options(tiny: Path, samples: Path, tmp_path: Path) -> CalibrationOptions:
    """Of a calibration of the tiny model on that set."""
    from step128_checkpoint.calibration.options import CalibrationOptions

    return CalibrationOptions(tiny, samples, tmp_path / "cal", device="cpu", batch_tokens=300, pilot_samples=3)
