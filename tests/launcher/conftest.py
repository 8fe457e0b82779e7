"""Fabricated checkpoints (headers and zeros, no model) and machines for the launcher's tests."""

import copy
import functools
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.configs_dir import find_configs_dir
from step128_launcher.hardware import probe
from step128_launcher.machine.types import Hardware
from step128_launcher.model.checkpoint import ModelFootprint, assume_footprint, read_footprint
from step128_launcher.model.model_config import read_model_config
from step128_launcher.model.quantization import CODEBOOK, Format, read_format, read_quantization
from step128_launcher.model.tensors import expected_tensors, kv_scale_names
from step128_launcher.planning.profiles import Profile, load_profile

TESTS = Path(__file__).parents[1]
REAL_MODEL = TESTS / "data" / "step-3.7-flash-240"
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "I8": 1}
ALL_LINEARS = [
    "routed_experts",
    "shared_experts",
    "attention",
    "dense_mlp",
    "lm_head",
    "mtp_linears",
    "mtp_heads",
]


def tiny_config(layers: int = 4, mtp: int = 3, experts: int = 4) -> dict[str, Any]:
    """The hub's config.json spelling with small dimensions."""
    kinds = ["full_attention" if i % 4 == 0 else "sliding_attention" for i in range(layers)]
    kinds += ["sliding_attention"] * mtp
    return {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "step3p5",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": layers,
            "num_nextn_predict_layers": mtp,
            "vocab_size": 96,
            "num_attention_heads": 4,
            "num_attention_groups": 2,
            "head_dim": 32,
            "sliding_window": 64,
            "layer_types": kinds,
            "partial_rotary_factors": [0.5 if kind == "full_attention" else 1.0 for kind in kinds],
            "attention_other_setting": {"num_attention_heads": 6},
            "max_position_embeddings": 4096,
            "moe_layers_enum": ",".join(map(str, range(1, layers))),
            "moe_num_experts": experts,
            "moe_top_k": 2,
            "moe_intermediate_size": 32,
            "share_expert_dim": 32,
        },
        "vision_config": {
            "width": 32,
            "layers": 1,
            "heads": 2,
            "mlp_ratio": 2.0,
            "patch_size": 14,
            "image_size": 56,
        },
    }


@pytest.fixture
def real_config() -> dict[str, Any]:
    """Step-3.7-Flash with 240 experts (README.md beside the file says where its figures are from)."""
    config: dict[str, Any] = json.loads((REAL_MODEL / "config.json").read_text())
    return config


def quantization_config(components: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "nl4",
        "format_version": 1,
        "group_size": 16,
        "bits_per_weight": 5.0,
        "codebook": list(CODEBOOK),
        "scale_dtype": "float16",
        "policy": "all-linears",
        "quantized_components": components,
        "unquantized_components": [],
        "method": "mse",
        "calibration": None,
    }


@pytest.fixture
def all_linears() -> dict[str, Any]:
    """The quantization_config of the default policy."""
    return quantization_config(ALL_LINEARS)


@dataclass
class Draft:
    """A checkpoint about to be written; a test may spoil it first. Tensors: name -> [dtype, shape, data or None]."""

    config: dict[str, Any]
    tensors: dict[str, list[Any]] = field(default_factory=dict)

    def rename(self, old: str, new: str) -> None:
        self.tensors[new] = self.tensors.pop(old)


def write_shard(path: Path, tensors: dict[str, list[Any]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, (dtype, shape, content) in tensors.items():
        start = len(data)
        data += content if content is not None else bytes(math.prod(shape) * DTYPE_BYTES[dtype])
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, len(data)]}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


Spoil = Callable[[Draft], None]
MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def configs_dir() -> Path:
    return find_configs_dir({})


@pytest.fixture(scope="session")
def nl4_format(configs_dir: Path) -> Format:
    return read_format(configs_dir)


@pytest.fixture(scope="session")
def cpu_profile(configs_dir: Path) -> Profile:
    return load_profile(configs_dir, "cpu")


@pytest.fixture(scope="session")
def profile_of(configs_dir: Path) -> Callable[[str], Profile]:
    """Return a shipped profile by name, read once."""
    return functools.cache(lambda name: load_profile(configs_dir, name))


@pytest.fixture(scope="session")
def recorded() -> Callable[[str], Hardware]:
    """Return a machine of tests/machines by name, probed once."""
    return functools.cache(lambda name: probe(TESTS / "machines" / name, {}))


@pytest.fixture(scope="session")
def real_model(nl4_format: Format) -> Callable[[str | None], ModelFootprint]:
    """Return the real-size model as if quantized by a policy (None: unquantized), derived once."""
    return functools.cache(lambda policy: assume_footprint(REAL_MODEL, nl4_format, policy))


@pytest.fixture
def make_checkpoint(tmp_path: Path, nl4_format: Format) -> MakeCheckpoint:
    """Write a checkpoint of the expected tensors: 2 shards and an index, NL4 and KV scales unless told otherwise."""

    def make(
        components: list[str] | None = None,
        *,
        quantized: bool = True,
        kv_scales: bool = True,
        mtp: bool = True,
        index: bool = True,
        spoil: Spoil | None = None,
        config: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        draft = Draft(copy.deepcopy(config or tiny_config()))
        if quantized:
            draft.config["quantization_config"] = quantization_config(components or ALL_LINEARS)
        (folder / "config.json").write_text(json.dumps(draft.config))
        model = read_model_config(folder)
        quantization = read_quantization(folder / "config.json", model.quantization_config, nl4_format)
        for tensor in expected_tensors(model, nl4_format, quantization).values():
            dtype = {"packed": "U8", "scale": "F16"}.get(tensor.role, "BF16")
            draft.tensors[tensor.name] = [dtype, tensor.shape, None]
        if kv_scales:
            for layer in range(len(model.layer_types)):
                for name, value in zip(kv_scale_names(layer), (0.01 * (layer + 1), 0.02 * (layer + 1)), strict=True):
                    draft.tensors[name] = ["F32", (1,), struct.pack("<f", value)]
        if not mtp:
            first = f"model.layers.{model.num_hidden_layers}."
            later = tuple(f"model.layers.{layer}." for layer in model.mtp_layer_indices)
            assert any(name.startswith(first) for name in draft.tensors)
            draft.tensors = {name: entry for name, entry in draft.tensors.items() if not name.startswith(later)}
        if spoil:
            spoil(draft)
            (folder / "config.json").write_text(json.dumps(draft.config))
        names = list(draft.tensors)
        halves = [names[: len(names) // 2], names[len(names) // 2 :]]
        weight_map: dict[str, str] = {}
        for number, half in enumerate(halves, start=1):
            shard = f"model-{number:05d}-of-00002.safetensors"
            write_shard(folder / shard, {name: draft.tensors[name] for name in half})
            weight_map |= dict.fromkeys(half, shard)
        if index:
            document = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(document))
        return folder

    return make


@pytest.fixture
def footprint(make_checkpoint: MakeCheckpoint, nl4_format: Format) -> ModelFootprint:
    return read_footprint(make_checkpoint(), nl4_format)


def machine(memory_gib: float = 16.0, cpus: int = 8) -> Hardware:
    available = int(memory_gib * 2**30)
    return Hardware(tuple(range(cpus)), None, available * 2, available, None, None, False, False)


@pytest.fixture
def make_machine() -> Callable[..., Hardware]:
    return machine
