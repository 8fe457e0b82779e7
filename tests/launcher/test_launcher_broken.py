"""Every kind of broken checkpoint is refused by file and tensor, with its exit code."""

import errno
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.model.checkpoint import read_footprint
from step128_launcher.model.quantization import Format

MakeCheckpoint = Callable[..., Path]
MIB = 1 << 20
LM_HEAD = "lm_head.weight"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def refusal(folder: Path, form: Format) -> LauncherError:
    with pytest.raises(LauncherError) as caught:
        read_footprint(folder, form)
    return caught.value


def _drop(name: str) -> Callable[[Any], None]:
    return lambda draft: draft.tensors.pop(name)


def _drop_scales(layers: range, *kinds: str) -> Callable[[Any], None]:
    def spoil(draft: Any) -> None:
        for layer in layers:
            for kind in kinds:
                del draft.tensors[f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale"]

    return spoil


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


def _vision(**changes: Any) -> Callable[[Any], None]:
    return lambda draft: draft.config["vision_config"].update(changes)


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
    "more experts a token than there are": (_text(moe_top_k=5), ["text_config.moe_top_k", "moe_num_experts (4)", "5"]),
    "heads that no group shares": (
        _text(num_attention_groups=3),
        ["text_config.num_attention_heads", "num_attention_groups (3)", "found 4"],
    ),
    "sliding heads that no group shares": (
        _text(attention_other_setting={"num_attention_heads": 5}),
        ["attention_other_setting.num_attention_heads", "num_attention_groups (2)", "found 5"],
    ),
    "absurd vocabulary": (_text(vocab_size=10**18), ["text_config.vocab_size", "at most 2147483648"]),
    "absurd experts": (_text(moe_num_experts=10**6), ["text_config.moe_num_experts", "at most 65536"]),
    "absurd vision layers": (_vision(layers=10**9), ["vision_config.layers", "at most 4096"]),
    "absurd vision width": (_vision(mlp_ratio=1e300), ["vision_config.mlp_ratio", "1e+300"]),
    "unknown method": (
        _config(quant_method="gguf"),
        ["quant_method", "'gguf'", "nl4, fp8, compressed-tensors, awq, gptq"],
    ),
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
        ["model.layers.5.self_attn.v_proj.v_scale", "some MTP layers", "1 of 6"],
    ),
    "one trunk KV scale missing": (
        _drop("model.layers.2.self_attn.k_proj.k_scale"),
        ["model.layers.2.self_attn.k_proj.k_scale", "some trunk layers", "1 of 8"],
    ),
    "K scales without V": (_drop_scales(range(7), "v"), ["model.layers.0.self_attn.v_proj.v_scale", "4 of 8"]),
    "KV scales for the MTP layers only": (_drop_scales(range(4), "k", "v"), ["MTP layers", "none for the trunk"]),
    "KV scale not positive": (
        lambda draft: draft.tensors.update({"model.layers.0.self_attn.k_proj.k_scale": ["F32", (1,), bytes(4)]}),
        ["model.layers.0.self_attn.k_proj.k_scale", "positive"],
    ),
    "MTP layer incomplete": (_drop("model.layers.5.eh_proj.weight"), ["model.layers.5.eh_proj.weight"]),
    "layer_types too short": (_text(layer_types=["full_attention"] * 4), ["layer_types", "7 layers", "4 entries"]),
    "layer_types with objects": (_text(layer_types=[{}] * 7), ["layer_types", "{}"]),
    "mlp_ratio not a number": (_vision(mlp_ratio=math.nan), ["vision_config.mlp_ratio", "nan"]),
    "mlp_ratio infinite": (_vision(mlp_ratio=math.inf), ["vision_config.mlp_ratio", "inf"]),
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


def _folder(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def _deep_header(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000)


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
    "config nested deeply": (
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        ["config.json", "nested too deeply"],
    ),
    "config with an endless number": (
        lambda folder: (folder / "config.json").write_text("9" * 10_000),
        ["config.json", "not valid JSON"],
    ),
    "config is a folder": (_folder("config.json"), ["config.json", "Is a directory"]),
    "index is a folder": (_folder("model.safetensors.index.json"), ["index.json", "Is a directory"]),
    "header nested deeply": (_deep_header, ["model-00002-of-00002.safetensors", "nested too deeply"]),
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


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"])
def test_files_that_may_not_be_read(
    name: str, make_checkpoint: MakeCheckpoint, nl4_format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, opened = make_checkpoint(), Path.open

    def deny(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == name:  # chmod would not stop root, who may be running this
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", deny)
    error = refusal(folder, nl4_format)
    assert error.exit_code == ExitCode.PERMISSION and name in error.message
