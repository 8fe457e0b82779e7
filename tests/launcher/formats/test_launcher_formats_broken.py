"""What is wrong with a checkpoint of another tool is refused, naming the file and the tensor."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.model.checkpoint import assume_footprint, read_footprint
from step128_launcher.model.quantization import Format

ForeignCheckpoint = Callable[..., Path]
Change = Callable[[dict[str, list[Any]], dict[str, Any]], None]
ELEMENT_BYTES = {"BF16": 2, "F16": 2, "I32": 4, "I8": 1, "F8_E4M3": 1}
Q_PROJ = "model.layers.0.self_attn.q_proj."
EXPERT_2 = "model.layers.1.moe.experts.2.up_proj."
PACKED = "compressed-tensors packed"


def drop(name: str) -> Change:
    def change(tensors: dict[str, list[Any]], config: dict[str, Any]) -> None:
        del tensors[name]

    return change


def replace(name: str, dtype: str, *shape: int) -> Change:
    def change(tensors: dict[str, list[Any]], config: dict[str, Any]) -> None:
        tensors[name] = [dtype, shape, bytes(math.prod(shape) * ELEMENT_BYTES[dtype])]

    return change


def setting(**values: Any) -> Change:
    def change(tensors: dict[str, list[Any]], config: dict[str, Any]) -> None:
        config["quantization_config"] = config["quantization_config"] | values

    return change


BROKEN: dict[str, tuple[str, Change, list[str]]] = {
    "scale missing": ("fp8 blocks", drop(f"{EXPERT_2}weight_scale_inv"), [f"{EXPERT_2}weight_scale_inv", "missing"]),
    "values missing": ("gptq", drop(f"{Q_PROJ}qweight"), [f"{Q_PROJ}qweight", "missing"]),
    "weight missing": ("gptq", drop("model.layers.0.self_attn.g_proj.weight"), ["g_proj.weight", "missing"]),
    "zero points missing": ("awq", drop(f"{Q_PROJ}qzeros"), [f"{Q_PROJ}qzeros", "missing"]),
    "an expert's values missing": ("awq", drop(f"{EXPERT_2}qweight"), [f"{EXPERT_2}qweight", "missing"]),
    "wrong packing": (
        "awq",
        replace(f"{Q_PROJ}qweight", "I32", 8, 128),
        ["model-0000", f"{Q_PROJ}qweight", "[8, 128]", "[64, 16]"],
    ),
    "wrong groups": (
        PACKED,
        replace(f"{Q_PROJ}weight_scale", "BF16", 128, 4),
        ["model-0000", f"{Q_PROJ}weight_scale", "[128, 4]", "[128, 2]"],
    ),
    "wrong dtype": (
        "fp8 rows",
        replace(f"{Q_PROJ}weight", "I8", 128, 64),
        ["model-0000", f"{Q_PROJ}weight", "I8", "F8_E4M3"],
    ),
    "unknown tensor": (
        "gptq",
        replace(f"{Q_PROJ}rotation", "F16", 64, 64),
        ["does not have", f"{Q_PROJ}rotation", "model-0000"],
    ),
    "quantized router": (
        "fp8 rows",
        replace("model.layers.1.moe.gate.weight", "F8_E4M3", 4, 64),
        ["model-0000", "moe.gate.weight", "F8_E4M3", "BF16"],
    ),
    "unknown packing": (PACKED, setting(format="marlin-24"), ["format", "'marlin-24'", "pack-quantized"]),
    "no groups": (PACKED, setting(config_groups={}), ["config_groups", "at least one"]),
    "unknown bits": ("gptq", setting(bits=3), ["bits", "3", "2 or 4 or 8"]),
    "no group size": ("awq", setting(group_size="many"), ["group_size", "'many'"]),
    "half a block size": ("fp8 blocks", setting(weight_block_size=[128]), ["weight_block_size", "[128]"]),
    "unknown method": ("awq", setting(quant_method="quip"), ["'quip'", "nl4, fp8, compressed-tensors, awq, gptq"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_is_refused_by_name(name: str, foreign_checkpoint: ForeignCheckpoint, nl4_format: Format) -> None:
    case, change, words = BROKEN[name]
    with pytest.raises(LauncherError) as caught:
        read_footprint(foreign_checkpoint(case, change=change), nl4_format)
    assert caught.value.exit_code == ExitCode.BAD_CHECKPOINT
    assert all(word in caught.value.message for word in words), caught.value.message


def test_a_format_of_which_nothing_is_there_is_refused(make_checkpoint: Any, nl4_format: Format) -> None:
    def spoil(draft: Any) -> None:
        draft.config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 16}

    folder = make_checkpoint(quantized=False, kv_scales=False, spoil=spoil)
    with pytest.raises(LauncherError, match=r"'awq', but every tensor in .* is unquantized"):
        read_footprint(folder, nl4_format)


def test_another_tools_format_has_no_size_without_shards(
    foreign_checkpoint: ForeignCheckpoint, nl4_format: Format
) -> None:
    folder = foreign_checkpoint("awq")
    with pytest.raises(LauncherError, match=r"cannot be sized from config\.json alone"):
        assume_footprint(folder, nl4_format, None)
    assert assume_footprint(folder, nl4_format, "experts").quantization is not None


def test_a_missing_and_a_truncated_shard_are_refused(foreign_checkpoint: ForeignCheckpoint, nl4_format: Format) -> None:
    shard = foreign_checkpoint("fp8 blocks") / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(LauncherError, match=r"model-00002-of-00002\.safetensors is truncated: tensor "):
        read_footprint(shard.parent, nl4_format)
    shard.unlink()
    with pytest.raises(LauncherError, match=r"model-00002-of-00002\.safetensors is missing"):
        read_footprint(shard.parent, nl4_format)
