"""Checkpoints quantized by other tools, and ones with a tensor for each expert, are read and weighed right."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.model.checkpoint import assume_footprint, read_footprint
from step128_launcher.model.quantization import Format
from step128_launcher.model.weights import indivisible, rank_weights

ForeignCheckpoint = Callable[..., Path]
MakeCheckpoint = Callable[..., Path]
ELEMENT_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8, "U8": 1, "F8_E4M3": 1}


def unquantized_parameters(folder: Path, form: Format) -> dict[tuple[str, bool], int]:
    """Component -> parameters, as the same config.json gives them without a quantization."""
    other = folder.parent / "plain"
    other.mkdir()
    text = (folder / "config.json").read_text().replace('"quantization_config"', '"not_this_one"')
    (other / "config.json").write_text(text)
    return {(part.name, part.draft): part.parameters for part in assume_footprint(other, form, None).components}


@pytest.mark.parametrize("per_expert", [False, True], ids=["3-D experts", "experts apart"])
def test_every_format_is_read(
    case_name: str, per_expert: bool, foreign_checkpoint: ForeignCheckpoint, cases: dict[str, Any], nl4_format: Format
) -> None:
    case, folder = cases[case_name], foreign_checkpoint(case_name, per_expert)
    found = read_footprint(folder, nl4_format)
    assert found.quantization is not None
    assert (found.quantization.method, found.quantization.policy) == (case.config["quant_method"], case.label)
    assert found.quantization.components == {"routed_experts", "shared_experts", "attention", "dense_mlp"}
    assert sum(part.stored_bytes for part in found.components) == found.stored_bytes
    parameters = {(part.name, part.draft): part.parameters for part in found.components}
    assert parameters == unquantized_parameters(folder, nl4_format)


def shares(case: Any, shape: tuple[int, int], row_parallel: bool, ranks: int) -> Iterator[int]:
    """Bytes on one rank of each tensor of a weight, by the tool's own layout of it."""
    entries = case.entries(*shape)
    transposed = any(suffix == "qweight" for suffix, *_ in entries)
    float8 = entries[0][:2] == ("weight", "F8_E4M3")  # whose scales vLLM holds in float32
    for suffix, dtype, parts in entries:
        total = math.prod(parts) * (4 if float8 and suffix != "weight" else ELEMENT_BYTES[dtype])
        if suffix == "g_idx":
            yield total // ranks if row_parallel else total
        elif suffix == "weight_shape" or len(parts) < 2:
            yield total
        else:
            yield total // ranks if parts[row_parallel != transposed] > 1 else total


def test_rank_bytes_stay_as_stored(
    case_name: str, foreign_checkpoint: ForeignCheckpoint, cases: dict[str, Any], nl4_format: Format
) -> None:
    """Quantized tensors cut for two ranks; the head gates, left in bfloat16, in the serving dtype."""
    ranks = 2
    footprint = read_footprint(foreign_checkpoint(case_name), nl4_format)
    found = rank_weights(footprint, dtype="float32", tensor_parallel_size=ranks, drafting=False, vision=False)
    by_name = {item.component: item for item in found}
    one_expert = [((32, 64), False), ((32, 64), False), ((64, 32), True)]  # gate, up and down of the small model
    expected = sum(sum(shares(cases[case_name], shape, row, ranks)) for shape, row in one_expert) * 3 * 4
    assert by_name["routed_experts"].rank_bytes == expected
    assert by_name["routed_experts"].explanation.startswith("stays packed")
    assert by_name["head_gates"].rank_bytes == (4 + 3 * 6) * 64 * 4 // ranks
    assert not any(item.vision or item.draft for item in found)


@pytest.mark.parametrize("quantized", [False, True])
def test_experts_apart_weigh_the_same(
    quantized: bool, make_checkpoint: MakeCheckpoint, split_experts: Any, nl4_format: Format, tmp_path: Path
) -> None:
    def apart(draft: Any) -> None:
        draft.tensors = split_experts(draft.tensors)

    fused = read_footprint(make_checkpoint(quantized=quantized), nl4_format)
    fused.path.rename(tmp_path / "fused")
    found = read_footprint(make_checkpoint(quantized=quantized, spoil=apart), nl4_format)
    assert found.tensors - fused.tensors == 3 * (4 - 1) * 3 * (2 if quantized else 1)
    assert [(part.name, part.parts) for part in found.components] == [
        (part.name, part.parts) for part in fused.components
    ]


@pytest.mark.parametrize(
    ("name", "ranks", "complaint"),
    [
        ("awq", 2, None),
        ("fp8 rows", 2, None),
        ("compressed-tensors packed", 2, r"16 of the 32 input channels of routed_experts.* group of 32"),
        ("fp8 blocks", 4, r"4 ranks do not divide the model's 6 sliding-attention heads"),
    ],
)
def test_ranks_may_not_cut_a_group(
    name: str, ranks: int, complaint: str | None, foreign_checkpoint: ForeignCheckpoint, nl4_format: Format
) -> None:
    found = indivisible(read_footprint(foreign_checkpoint(name), nl4_format), ranks)
    assert found is None if complaint is None else re.search(complaint, found or "")
