"""Checkpoints quantized by other tools, and bfloat16 ones with a tensor for each expert."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.checkpoint import assume_footprint, read_footprint
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.quantization import Format
from step128_launcher.weights import rank_weights

MakeCheckpoint = Callable[..., Path]
Entry = tuple[str, str, tuple[int, ...]]  # suffix in place of "weight", dtype, shape
ELEMENT_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8, "U8": 1, "I8": 1, "F8_E4M3": 1}
LINEAR = re.compile(r"model\.layers\.[0-3]\..*_proj\.weight")
EXPERT = re.compile(r"(.*\.moe)\.((?:gate|up|down)_proj\.weight)")
ROW_PARALLEL = ("o_proj", "down_proj")


def scheme(**weights: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": {"type": "int"} | weights}}


@dataclass(frozen=True)
class Case:
    """One format: its quantization_config, and what its tool writes for a weight [N, K]."""

    config: dict[str, Any]
    entries: Callable[[int, int], list[Entry]]
    label: str


def packed(n: int, k: int) -> list[Entry]:
    return [
        ("weight_packed", "I32", (n, k // 8)),
        ("weight_scale", "BF16", (n, k // 32)),
        ("weight_shape", "I64", (2,)),
    ]


CASES = {
    "fp8 blocks": Case(
        {"quant_method": "fp8", "weight_block_size": [32, 16]},
        lambda n, k: [("weight", "F8_E4M3", (n, k)), ("weight_scale_inv", "F32", (-(-n // 32), k // 16))],
        "32x16 blocks",
    ),
    "fp8 rows": Case(
        {"quant_method": "fp8"},
        lambda n, k: [("weight", "F8_E4M3", (n, k)), ("weight_scale", "F32", (n, 1))],
        "a scale a row or weight",
    ),
    "fp8 one scale": Case(
        {"quant_method": "fp8", "activation_scheme": "static"},
        lambda n, k: [("weight", "F8_E4M3", (n, k)), ("weight_scale", "F32", ()), ("input_scale", "F32", ())],
        "a scale a row or weight",
    ),
    "compressed-tensors float": Case(
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": scheme(num_bits=8, strategy="channel"),
        },
        lambda n, k: [("weight", "F8_E4M3", (n, k)), ("weight_scale", "BF16", (n, 1))],
        "float-quantized",
    ),
    "compressed-tensors packed": Case(
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": scheme(num_bits=4, strategy="group", group_size=32),
        },
        packed,
        "pack-quantized",
    ),
    "compressed-tensors packed, zero points": Case(
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": scheme(num_bits=4, strategy="group", group_size=32),
        },
        lambda n, k: [*packed(n, k), ("weight_zero_point", "I32", (-(-n // 8), k // 32))],
        "pack-quantized",
    ),
    "compressed-tensors nvfp4": Case(
        {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "config_groups": scheme(num_bits=4, strategy="tensor_group", group_size=16),
        },
        lambda n, k: [
            ("weight_packed", "U8", (n, k // 2)),
            ("weight_scale", "F8_E4M3", (n, k // 16)),
            ("weight_global_scale", "F32", (1,)),
        ],
        "nvfp4-pack-quantized",
    ),
    "awq": Case(
        {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True},
        lambda n, k: [
            ("qweight", "I32", (k, n // 8)),
            ("qzeros", "I32", (k // 16, n // 8)),
            ("scales", "F16", (k // 16, n)),
        ],
        "4-bit, groups of 16",
    ),
    "gptq": Case(
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False},
        lambda n, k: [
            ("qweight", "I32", (k // 8, n)),
            ("qzeros", "I32", (k // 16, n // 8)),
            ("scales", "F16", (k // 16, n)),
            ("g_idx", "I32", (k,)),
        ],
        "4-bit, groups of 16",
    ),
}
WITHOUT_HEAD_GATES = re.compile(r"g_proj\.weight$")  # 4 and 6 rows: no tool packs them


def size(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ELEMENT_BYTES[dtype]


def entry(dtype: str, shape: tuple[int, ...]) -> list[Any]:
    return [dtype, shape, bytes(size(dtype, shape))]


def experts_apart(tensors: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The same tensors, with a 2-D one for each expert."""
    apart: dict[str, list[Any]] = {}
    for name, (dtype, shape, content) in tensors.items():
        match = EXPERT.fullmatch(name)
        for expert in range(shape[0]) if match else ():
            apart[f"{match[1]}.experts.{expert}.{match[2]}"] = [dtype, shape[1:], None]  # type: ignore[index]
        if not match:
            apart[name] = [dtype, shape, content]
    return apart


def convert(case: Case, per_expert: bool) -> Callable[[Any], None]:
    """Return what turns a bfloat16 draft into one of this format."""

    def spoil(draft: Any) -> None:
        draft.config["quantization_config"] = case.config
        tensors = experts_apart(draft.tensors) if per_expert else draft.tensors
        draft.tensors = {}
        for name, (dtype, shape, content) in tensors.items():
            if not LINEAR.fullmatch(name) or WITHOUT_HEAD_GATES.search(name):
                draft.tensors[name] = [dtype, shape, content]
                continue
            *outer, rows, columns = shape
            for suffix, kind, parts in case.entries(rows, columns):
                if suffix == "weight_shape":
                    parts = (len(shape),)  # noqa: PLW2901
                    draft.tensors[name.removesuffix("weight") + suffix] = entry(kind, parts)
                    continue
                draft.tensors[name.removesuffix("weight") + suffix] = entry(kind, (*outer, *parts))

    return spoil


@pytest.mark.parametrize("per_expert", [False, True], ids=["3-D experts", "experts apart"])
@pytest.mark.parametrize("name", CASES)
def test_every_format_is_read(name: str, per_expert: bool, make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    case = CASES[name]
    folder = make_checkpoint(quantized=False, kv_scales=False, spoil=convert(case, per_expert))
    found = read_footprint(folder, nl4_format)
    assert found.quantization is not None
    assert (found.quantization.method, found.quantization.policy) == (case.config["quant_method"], case.label)
    assert found.quantization.components == {"routed_experts", "shared_experts", "attention", "dense_mlp"}
    assert sum(part.stored_bytes for part in found.components) == found.stored_bytes
    plain = read_footprint_of_plain(folder, nl4_format)
    assert {(part.name, part.draft): part.parameters for part in found.components} == plain


def read_footprint_of_plain(folder: Path, form: Format) -> dict[tuple[str, bool], int]:
    """Component -> parameters, as the same config.json gives them without a quantization."""
    config = (folder / "config.json").read_text()
    other = folder.parent / "plain"
    other.mkdir()
    (other / "config.json").write_text(re.sub(r'"quantization_config"', '"not_this_one"', config))
    return {(part.name, part.draft): part.parameters for part in assume_footprint(other, form, None).components}


def shares(case: Case, shape: tuple[int, int], row_parallel: bool, ranks: int) -> Iterator[int]:
    """Bytes on one rank of each tensor of a weight, by the tool's own layout of it."""
    transposed = "qweight" in {suffix for suffix, *_ in case.entries(*shape)}
    for suffix, dtype, parts in case.entries(*shape):
        total = size(dtype, parts)
        if suffix == "g_idx":
            yield total // ranks if row_parallel else total
        elif suffix == "weight_shape" or len(parts) < 2:
            yield total
        else:
            axis = int(row_parallel) if not transposed else int(not row_parallel)
            yield total // ranks if parts[axis] > 1 else total


@pytest.mark.parametrize("name", CASES)
def test_rank_bytes_stay_as_stored(name: str, make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    """Quantized tensors cut for two ranks; the head gates, left in bfloat16, in the serving dtype."""
    case, ranks = CASES[name], 2
    folder = make_checkpoint(quantized=False, kv_scales=False, spoil=convert(case, True))
    found = rank_weights(
        read_footprint(folder, nl4_format), dtype="float32", tensor_parallel_size=ranks, drafting=False, vision=False
    )
    by_name = {item.component: item for item in found}
    one_expert = [((32, 64), False), ((32, 64), False), ((64, 32), True)]  # gate, up, down of the small model
    expected = sum(sum(shares(case, shape, row, ranks)) for shape, row in one_expert) * 3 * 4
    assert by_name["routed_experts"].rank_bytes == expected
    assert by_name["routed_experts"].explanation.startswith("stays packed")
    assert by_name["head_gates"].rank_bytes == (4 + 3 * 6) * 64 * 4 // ranks
    assert not any(item.vision or item.draft for item in found)


@pytest.mark.parametrize("quantized", [False, True])
def test_experts_apart_weigh_the_same(
    quantized: bool, make_checkpoint: MakeCheckpoint, nl4_format: Format, tmp_path: Path
) -> None:
    def apart(draft: Any) -> None:
        tensors = {}
        for name, (dtype, shape, content) in draft.tensors.items():
            match = re.fullmatch(r"(.*\.moe)\.((?:gate|up|down)_proj\.weight\w*)", name)
            for expert in range(shape[0]) if match else ():
                tensors[f"{match[1]}.experts.{expert}.{match[2]}"] = [dtype, shape[1:], None]  # type: ignore[index]
            if not match:
                tensors[name] = [dtype, shape, content]
        draft.tensors = tensors

    fused = read_footprint(make_checkpoint(quantized=quantized), nl4_format)
    fused.path.rename(tmp_path / "fused")
    found = read_footprint(make_checkpoint(quantized=quantized, spoil=apart), nl4_format)
    assert found.tensors - fused.tensors == 3 * (4 - 1) * 3 * (2 if quantized else 1)
    assert [(part.name, part.parts) for part in found.components] == [
        (part.name, part.parts) for part in fused.components
    ]


Spoil = Callable[[dict[str, list[Any]], dict[str, Any]], None]
Q_PROJ = "model.layers.0.self_attn.q_proj."
EXPERT_2 = "model.layers.1.moe.experts.2.up_proj."


def _drop(name: str) -> Spoil:
    def spoil(tensors: dict[str, list[Any]], config: dict[str, Any]) -> None:
        del tensors[name]

    return spoil


def _replace(name: str, dtype: str, *shape: int) -> Spoil:
    def spoil(tensors: dict[str, list[Any]], config: dict[str, Any]) -> None:
        tensors[name] = entry(dtype, shape)

    return spoil


def _set(**values: Any) -> Spoil:
    def spoil(tensors: dict[str, list[Any]], config: dict[str, Any]) -> None:
        config["quantization_config"] = config["quantization_config"] | values

    return spoil


def _unquantize(tensors: dict[str, list[Any]], config: dict[str, Any]) -> None:
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 16}


BROKEN: dict[str, tuple[str, Spoil, list[str]]] = {
    "scale missing": ("fp8 blocks", _drop(f"{EXPERT_2}weight_scale_inv"), [f"{EXPERT_2}weight_scale_inv", "missing"]),
    "values missing": ("gptq", _drop(f"{Q_PROJ}qweight"), [f"{Q_PROJ}qweight", "missing"]),
    "both missing": ("gptq", _drop("model.layers.0.self_attn.g_proj.weight"), ["g_proj.weight", "missing"]),
    "zero points missing": ("awq", _drop(f"{Q_PROJ}qzeros"), [f"{Q_PROJ}qzeros", "missing"]),
    "one expert missing": ("awq", _drop(f"{EXPERT_2}qweight"), [f"{EXPERT_2}qweight", "missing"]),
    "wrong packing": (
        "awq",
        _replace(f"{Q_PROJ}qweight", "I32", 8, 128),
        ["model-0000", f"{Q_PROJ}qweight", "[8, 128]", "[64, 16]"],
    ),
    "wrong group": (
        "compressed-tensors packed",
        _replace(f"{Q_PROJ}weight_scale", "BF16", 128, 4),
        ["model-0000", f"{Q_PROJ}weight_scale", "[128, 4]", "[128, 2]"],
    ),
    "wrong dtype": (
        "fp8 rows",
        _replace(f"{Q_PROJ}weight", "I8", 128, 64),
        ["model-0000", f"{Q_PROJ}weight", "I8", "F8_E4M3"],
    ),
    "unknown tensor": (
        "gptq",
        _replace(f"{Q_PROJ}rotation", "F16", 64, 64),
        ["does not have", f"{Q_PROJ}rotation", "model-0000"],
    ),
    "quantized router": (
        "fp8 rows",
        _replace("model.layers.1.moe.gate.weight", "F8_E4M3", 4, 64),
        ["model-0000", "moe.gate.weight", "F8_E4M3", "BF16"],
    ),
    "unknown packing": (
        "compressed-tensors packed",
        _set(format="marlin-24"),
        ["format", "'marlin-24'", "pack-quantized"],
    ),
    "no groups": ("compressed-tensors packed", _set(config_groups={}), ["config_groups", "at least one"]),
    "bits": ("gptq", _set(bits=3), ["bits", "3", "2 or 4 or 8"]),
    "group size": ("awq", _set(group_size="many"), ["group_size", "'many'"]),
    "block size": ("fp8 blocks", _set(weight_block_size=[128]), ["weight_block_size", "[128]"]),
    "unknown method": ("awq", _set(quant_method="quip"), ["'quip'", "nl4, fp8, compressed-tensors, awq, gptq"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_is_refused_by_name(name: str, make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    case, change, words = BROKEN[name]

    def spoil(draft: Any) -> None:
        convert(CASES[case], True)(draft)
        change(draft.tensors, draft.config)

    folder = make_checkpoint(quantized=False, kv_scales=False, spoil=spoil)
    with pytest.raises(LauncherError) as caught:
        read_footprint(folder, nl4_format)
    assert caught.value.exit_code == ExitCode.BAD_CHECKPOINT
    assert all(word in caught.value.message for word in words), caught.value.message


def test_a_format_of_which_nothing_is_there_is_refused(make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    def spoil(draft: Any) -> None:
        _unquantize(draft.tensors, draft.config)

    folder = make_checkpoint(quantized=False, kv_scales=False, spoil=spoil)
    with pytest.raises(LauncherError, match="every tensor .* is unquantized"):
        read_footprint(folder, nl4_format)


def test_another_tools_format_has_no_size_without_shards(make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    folder = make_checkpoint(quantized=False, kv_scales=False, spoil=convert(CASES["awq"], True))
    with pytest.raises(LauncherError, match="cannot be sized from config.json alone"):
        assume_footprint(folder, nl4_format, None)
    assert assume_footprint(folder, nl4_format, "experts").quantization is not None


def test_a_missing_shard_is_refused(make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    folder = make_checkpoint(quantized=False, kv_scales=False, spoil=convert(CASES["fp8 blocks"], True))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(LauncherError, match=r"model-00002-of-00002\.safetensors is missing"):
        read_footprint(folder, nl4_format)
