"""The weights on one rank, and footprints assumed from config.json; vllm_code/ compares them with vLLM itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.model.checkpoint import ModelFootprint, assume_footprint, read_footprint
from step128_launcher.model.quantization import Format, read_format
from step128_launcher.model.weights import RankWeights, indivisible, rank_weights

MakeCheckpoint = Callable[..., Path]
GIB = 2**30


@pytest.fixture
def real_folder(real_config: dict[str, Any], tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(real_config))
    return tmp_path


def total(footprint: ModelFootprint, ranks: int, **options: Any) -> int:
    return sum(item.rank_bytes for item in weigh(footprint, ranks, **options))


def weigh(
    footprint: ModelFootprint, ranks: int, *, drafting: bool = True, vision: bool = True, **options: Any
) -> tuple[RankWeights, ...]:
    return rank_weights(
        footprint, dtype="bfloat16", tensor_parallel_size=ranks, drafting=drafting, vision=vision, **options
    )


@pytest.mark.parametrize("quantized", [True, False])
def test_assumed_equals_read(quantized: bool, make_checkpoint: MakeCheckpoint, nl4_format: Format) -> None:
    """What config.json and the policy's name give is what a checkpoint of that policy then holds."""
    folder = make_checkpoint(quantized=quantized, kv_scales=quantized)
    found = read_footprint(folder, nl4_format)
    for policy in ("all-linears", None) if quantized else (None,):
        assumed = assume_footprint(folder, nl4_format, policy)
        assert assumed.assumed and not found.assumed
        for name in ("config", "quantization", "tensors", "stored_bytes", "components", "mtp_layers"):
            assert getattr(assumed, name) == getattr(found, name), name
        assert (assumed.kv_scales is None) == (found.kv_scales is None)
        assert assumed.unscaled_layers == ()


def test_an_unknown_policy_names_the_known_ones(real_folder: Path, nl4_format: Format) -> None:
    with pytest.raises(LauncherError) as caught:
        assume_footprint(real_folder, nl4_format, "half")
    assert caught.value.exit_code == ExitCode.BAD_CONFIGURATION
    assert "'half'" in caught.value.message and "experts, experts+linears, all-linears, all" in caught.value.message


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("experts: [routed_experts]", "experts: [router]", "'router'"),
        ("default_policy: all-linears", "default_policy: half", "'half'"),
        ("policies:", "rules:", "policies"),
    ],
)
def test_a_policy_file_that_contradicts_itself(
    old: str, new: str, word: str, configs_dir: Path, tmp_path: Path
) -> None:
    text = (configs_dir / "quantization" / "nl4.yaml").read_text()
    assert old in text
    (tmp_path / "quantization").mkdir()
    (tmp_path / "quantization" / "nl4.yaml").write_text(text.replace(old, new))
    with pytest.raises(LauncherError, match=word) as caught:
        read_format(tmp_path)
    assert caught.value.exit_code == ExitCode.BAD_CONFIGURATION


@pytest.mark.parametrize(
    ("policy", "ranks", "gib"),
    [("experts", 2, 56.90), ("experts", 4, 28.82), ("experts", 8, 14.79), ("experts+linears", 4, 27.04)],
)
def test_published_figures_of_the_real_size(
    policy: str, ranks: int, gib: float, real_folder: Path, nl4_format: Format
) -> None:
    assert total(assume_footprint(real_folder, nl4_format, policy), ranks) / GIB == pytest.approx(gib, abs=0.005)


def test_what_is_not_used_is_not_held(real_folder: Path, nl4_format: Format) -> None:
    footprint = assume_footprint(real_folder, nl4_format, None)
    everything = total(footprint, 1)
    assert everything - total(footprint, 1, drafting=False) == 2 * 2_428_171_008
    assert everything - total(footprint, 1, vision=False) == 2 * 1_981_014_784
    held = weigh(footprint, 1, drafting=False, vision=False)
    assert not any(item.draft or item.vision for item in held)
    router = next(item for item in held if item.component == "router")
    assert router.rank_bytes == 4 * 41_297_760 and router.explanation == "held in float32"


def test_more_ranks_than_kv_heads_copy_them(footprint: ModelFootprint) -> None:
    """Two KV heads of 32 channels: each of four ranks holds one whole."""
    by_ranks = {ranks: {item.component: item for item in weigh(footprint, ranks)} for ranks in (1, 2, 4)}
    kv = 4 * 2 * (2 * 32) * 64 * 5 // 8  # K and V of four trunk layers, packed
    one, four = by_ranks[1]["attention"].rank_bytes, by_ranks[4]["attention"].rank_bytes
    assert by_ranks[2]["attention"].rank_bytes == one // 2
    assert four == (one - kv) // 4 + kv // 2
    assert by_ranks[4]["norms"].rank_bytes == by_ranks[1]["norms"].rank_bytes
    assert by_ranks[4]["norms"].explanation == "held in bfloat16, whole on each of 4 ranks"


def test_the_vocabulary_is_padded_before_it_is_cut(footprint: ModelFootprint) -> None:
    """96 tokens are held as 128 rows of 64 channels."""
    embedding = {ranks: next(i for i in weigh(footprint, ranks) if i.component == "embed_tokens") for ranks in (1, 2)}
    assert embedding[1].rank_bytes == 128 * 64 * 2 and embedding[2].rank_bytes == 64 * 64 * 2


def test_experts_shared_out_whole(footprint: ModelFootprint) -> None:
    """Of four experts the fullest of three ranks has two."""
    cut, shared = (
        next(item for item in weigh(footprint, ranks, expert_parallel=ranks == 3) if item.component == "routed_experts")
        for ranks in (1, 3)
    )
    assert shared.rank_bytes == cut.rank_bytes // 2 and "expert parallel" in shared.explanation


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, None),
        (2, None),
        (4, None),
        (8, None),
        (16, None),
        (3, "3 ranks do not divide the model's 64 attention heads"),
        (32, "vision heads"),
    ],
)
def test_what_vllm_cannot_cut(ranks: int, words: str | None, real_folder: Path, nl4_format: Format) -> None:
    complaint = indivisible(assume_footprint(real_folder, nl4_format, "all"), ranks)
    assert complaint is None if words is None else words in (complaint or "")


def test_a_group_may_not_be_cut(real_config: dict[str, Any], tmp_path: Path, nl4_format: Format) -> None:
    real_config["text_config"]["moe_intermediate_size"] = 1280 - 64  # 76 groups: 16 ranks would have 4.75 each
    (tmp_path / "config.json").write_text(json.dumps(real_config))
    footprint = assume_footprint(tmp_path, nl4_format, "experts")
    complaint = indivisible(footprint, 16)
    assert complaint is not None and "76 of the 1216 input channels of routed_experts" in complaint
    assert indivisible(footprint, 16, expert_parallel=True) is None
    assert indivisible(assume_footprint(tmp_path, nl4_format, None), 16) is None
