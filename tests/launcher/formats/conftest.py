"""Small checkpoints as other tools quantize them, written down from those tools' layouts."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

MakeCheckpoint = Callable[..., Path]
Entry = tuple[str, str, tuple[int, ...]]  # suffix in place of "weight", dtype, shape
ELEMENT_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8, "U8": 1, "I8": 1, "F8_E4M3": 1}
LINEAR = re.compile(r"model\.layers\.[0-3]\..*_proj\.weight")
HEAD_GATE = re.compile(r".*\.g_proj\.weight")  # 4 and 6 rows: no tool packs them
EXPERT = re.compile(r"(.*\.moe)\.((?:gate|up|down)_proj\.weight\w*)")


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
            if not LINEAR.fullmatch(name) or HEAD_GATE.fullmatch(name):
                draft.tensors[name] = [dtype, shape, content]
                continue
            *outer, rows, columns = shape
            for suffix, kind, parts in case.entries(rows, columns):
                stored = (len(shape),) if suffix == "weight_shape" else (*outer, *parts)
                draft.tensors[name.removesuffix("weight") + suffix] = entry(kind, stored)

    return spoil


Change = Callable[[dict[str, list[Any]], dict[str, Any]], None]


@pytest.fixture
def foreign_checkpoint(make_checkpoint: MakeCheckpoint) -> Callable[..., Path]:
    """Write a small checkpoint of one of CASES; a test may spoil its tensors and its config first."""

    def make(case: str, per_expert: bool = True, change: Change | None = None) -> Path:
        def spoil(draft: Any) -> None:
            convert(CASES[case], per_expert)(draft)
            if change:
                change(draft.tensors, draft.config)

        return make_checkpoint(quantized=False, kv_scales=False, spoil=spoil)

    return make


@pytest.fixture
def cases() -> dict[str, Case]:
    return CASES


@pytest.fixture
def split_experts() -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
    return experts_apart


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_name" in metafunc.fixturenames:
        metafunc.parametrize("case_name", CASES)
