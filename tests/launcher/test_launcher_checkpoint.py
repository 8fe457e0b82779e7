"""Reading a checkpoint's headers, and refusing every kind of broken one by file and tensor."""

import json
import math
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from step128_launcher.checkpoint import read_footprint
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.model_config import read_model_config
from step128_launcher.quantization import CODEBOOK, Format
from step128_launcher.tensors import expected_tensors

MakeCheckpoint = Callable[..., Path]
LM_HEAD = "lm_head.weight"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def refusal(folder: Path, form: Format) -> LauncherError:
    with pytest.raises(LauncherError) as caught:
        read_footprint(folder, form)
    return caught.value


def test_footprint_of_a_quantized_checkpoint(make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    found = read_footprint(make_checkpoint(), nl4_format)
    assert found.shards == 2
    assert found.mtp_layers == 3
    assert found.quantization is not None and found.quantization.policy == "all-linears"
    assert found.kv_scales is not None and set(found.kv_scales) == set(range(7))
    assert found.kv_scales[6].k == pytest.approx(0.07)
    assert found.kv_scales[6].v == pytest.approx(0.14)
    parts = {(part.name, part.draft): part for part in found.components}
    experts = parts["routed_experts", False]
    assert experts.quantized and experts.parameters == 3 * 3 * 4 * 32 * 64
    assert experts.stored_bytes == experts.parameters * 5 // 8
    assert parts["mtp_heads", True].quantized and not parts["embed_tokens", False].quantized
    assert sum(part.stored_bytes for part in found.components) == found.stored_bytes


def test_seventeen_tensors_per_mtp_layer(make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    found = read_footprint(make_checkpoint(quantized=False, kv_scales=False), nl4_format)
    assert sum(part.tensors for part in found.components if part.draft) == 3 * 17


def test_unquantized_without_index_scales_and_mtp(make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    found = read_footprint(make_checkpoint(quantized=False, kv_scales=False, mtp=False, index=False), nl4_format)
    assert (found.quantization, found.kv_scales, found.mtp_layers) == (None, None, 0)


def test_reads_what_safetensors_writes(make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    folder = make_checkpoint(index=False)
    for shard in folder.glob("*.safetensors"):
        # BF16 is unknown to numpy, so the fabricated shards are re-saved with those tensors as F16.
        raw = shard.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        shard.write_bytes(raw[:8] + raw[8 : 8 + length].replace(b'"BF16"', b' "F16"') + raw[8 + length :])
        tensors = load_file(shard)
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, shard)
    assert read_footprint(folder, nl4_format).tensors == read_footprint(folder, nl4_format).tensors > 100


def test_real_size_parameter_count(real_config: dict[str, Any], nl4_format: Format, tmp_path: Path) -> None:
    """The published model's count by component (closed form, equal to vLLM's instantiated model)."""
    (tmp_path / "config.json").write_text(json.dumps(real_config))
    table = expected_tensors(read_model_config(tmp_path), nl4_format, None)
    assert sum(math.prod(tensor.shape) for tensor in table.values()) == 169_648_118_368


def _drop(name: str) -> Callable[[Any], None]:
    return lambda draft: draft.tensors.pop(name)


def _retype(name: str, dtype: str) -> Callable[[Any], None]:
    def spoil(draft: Any) -> None:
        draft.tensors[name][0] = dtype

    return spoil


def _reshape(name: str, shape: tuple[int, ...]) -> Callable[[Any], None]:
    def spoil(draft: Any) -> None:
        draft.tensors[name][1] = shape

    return spoil


def _config(**changes: Any) -> Callable[[Any], None]:
    return lambda draft: draft.config["quantization_config"].update(changes)


def _text(**changes: Any) -> Callable[[Any], None]:
    return lambda draft: draft.config["text_config"].update(changes)


SPOILED = {
    "missing": (_drop("model.norm.weight"), ["1 of", "model.norm.weight"]),
    "misnamed": (
        lambda draft: draft.rename(f"{K_PROJ}_packed", "model.layers.1.self_attn.kproj.weight_packed"),
        [f"{K_PROJ}_packed", "there is model.layers.1.self_attn.kproj.weight_packed: misnamed?"],
    ),
    "unexpected": (
        lambda draft: draft.tensors.update({"model.layers.1.extra.weight": ["BF16", (2,), None]}),
        ["model.layers.1.extra.weight", "does not have"],
    ),
    "packed without scale": (_drop(f"{LM_HEAD}_scale"), [f"{LM_HEAD}_scale"]),
    "scale without packed": (_drop(f"{LM_HEAD}_packed"), [f"{LM_HEAD}_packed"]),
    "packed as I8": (_retype(f"{LM_HEAD}_packed", "I8"), ["lm_head.weight_packed", "I8", "U8", ".safetensors"]),
    "scale as BF16": (_retype(f"{LM_HEAD}_scale", "BF16"), ["lm_head.weight_scale", "BF16", "F16"]),
    "bf16 tensor as I8": (_retype("model.norm.weight", "I8"), ["model.norm.weight", "I8", "BF16"]),
    "packed of another shape": (
        _reshape(f"{LM_HEAD}_packed", (96, 16)),
        ["lm_head.weight_packed", "[96, 16]", "[96, 32]"],
    ),
    "scale of another shape": (_reshape(f"{LM_HEAD}_scale", (96, 2)), ["lm_head.weight_scale", "[96, 4]"]),
    "fewer experts in config": (_text(moe_num_experts=2), ["moe.gate.weight", "[4, 64]", "[2, 64]"]),
    "unknown method": (_config(quant_method="awq"), ["quant_method", "'awq'", "'nl4'"]),
    "unknown version": (_config(format_version=2), ["format_version", "2", "1"]),
    "unknown group size": (_config(group_size=32), ["group_size", "32"]),
    "unknown codebook": (_config(codebook=[0] * 16), ["codebook"]),
    "unknown component": (_config(quantized_components=["attention", "moon"]), ["moon"]),
    "component said to be unquantized": (
        _config(quantized_components=["routed_experts"]),
        ["does not call it quantized", "_packed"],
    ),
    "one KV scale missing": (
        _drop("model.layers.5.self_attn.v_proj.v_scale"),
        ["model.layers.5.self_attn.v_proj.v_scale", "1 of 14"],
    ),
    "KV scale not positive": (
        lambda draft: draft.tensors.update({"model.layers.0.self_attn.k_proj.k_scale": ["F32", (1,), bytes(4)]}),
        ["model.layers.0.self_attn.k_proj.k_scale", "positive"],
    ),
    "MTP layer incomplete": (_drop("model.layers.5.eh_proj.weight"), ["model.layers.5.eh_proj.weight"]),
    "layer_types too short": (_text(layer_types=["full_attention"] * 4), ["layer_types", "7 layers", "4 entries"]),
    "no hidden_size": (lambda draft: draft.config["text_config"].pop("hidden_size"), ["text_config.hidden_size"]),
    "other architecture": (
        lambda draft: draft.config.update(architectures=["LlamaForCausalLM"]),
        ["LlamaForCausalLM", "Step3p7ForConditionalGeneration"],
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_broken_content_is_refused_by_name(case: str, make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    spoil, wanted = SPOILED[case]
    error = refusal(make_checkpoint(spoil=spoil), nl4_format)
    assert error.exit_code == ExitCode.BAD_CHECKPOINT
    for text in wanted:
        assert text in error.message, error.message


def _truncate(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])


def _truncate_header(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])


def _no_json(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(struct.pack("<Q", 4) + b"oops")


def _pointer(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def _offsets(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"data_offsets": [0, ', b'"data_offsets": [1, ', 1))


def _trailing(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes() + b"x")


def _index_names_absent(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    document["weight_map"]["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(document))


DAMAGED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing shard": (
        lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
        ["model-00002-of-00002.safetensors", "missing", "1 of 2"],
    ),
    "truncated shard": (_truncate, ["model-00002-of-00002.safetensors", "truncated", "tensor"]),
    "truncated header": (_truncate_header, ["model-00002-of-00002.safetensors", "truncated", "header"]),
    "header is no JSON": (_no_json, ["model-00002-of-00002.safetensors", "not JSON"]),
    "git-lfs pointer": (_pointer, ["model-00002-of-00002.safetensors", "no safetensors file"]),
    "offsets contradict shape": (_offsets, ["model-00001-of-00002.safetensors", "data_offsets"]),
    "bytes after the last tensor": (_trailing, ["model-00001-of-00002.safetensors", "1 bytes after"]),
    "index names an absent tensor": (_index_names_absent, ["model.ghost.weight", "model-00001-of-00002.safetensors"]),
    "index is no JSON": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
        ["model.safetensors.index.json", "not valid JSON"],
    ),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_by_name(case: str, make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    damage, wanted = DAMAGED[case]
    folder = make_checkpoint()
    damage(folder)
    error = refusal(folder, nl4_format)
    assert error.exit_code == ExitCode.BAD_CHECKPOINT
    for text in wanted:
        assert text in error.message, error.message


def test_missing_shard_without_index(make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    folder = make_checkpoint(index=False)
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert "model-00001-of-00002.safetensors is missing" in refusal(folder, nl4_format).message


@pytest.mark.parametrize("make_folder", [False, True])
def test_no_folder_or_no_config(make_folder: bool, tmp_path: Path, nl4_format: Format) -> None:
    folder = tmp_path / "nothing"
    if make_folder:
        folder.mkdir()
    assert refusal(folder, nl4_format).exit_code == ExitCode.INPUT_NOT_FOUND


def test_forty_thousand_tensors_in_a_second(tmp_path: Path) -> None:
    from step128_launcher.shards import read_shards

    for shard in range(100):
        entries = {
            f"model.layers.{shard}.t{i}.weight": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}
            for i in range(400)
        }
        raw = json.dumps(entries).encode()
        name = f"model-{shard + 1:05d}-of-00100.safetensors"
        (tmp_path / name).write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(400))
    start = time.perf_counter()
    tensors, shards = read_shards(tmp_path)
    assert time.perf_counter() - start < 1.0
    assert (len(tensors), shards) == (40_000, 100)


def test_codebook_is_the_kernels_codebook() -> None:
    from step128_kernels.codebook import CODEBOOK as THE_ONE

    assert tuple(THE_ONE) == CODEBOOK
