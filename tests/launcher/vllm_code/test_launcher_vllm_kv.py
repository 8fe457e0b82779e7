"""The closed KV-cache formulas, equal to vLLM's planning with the real model's own layers: 768 combinations."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from step128_launcher.model.checkpoint import ModelFootprint
from step128_launcher.planning.kv_cache import kv_shape, predict

Figures = Callable[[], dict[str, Any]]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_plans_equal_vllm(ranks: int, vllm_figures: Figures, real_footprints: dict[str | None, ModelFootprint]) -> None:
    found = vllm_figures()["kv"][f"all-linears/{ranks}"]
    assert len(found) == 2 * 2 * 3 * 2 * 2 * 4
    for theirs in found:
        drafts, element, block, batched, batches, context = theirs["case"]
        shape = kv_shape(
            real_footprints["all-linears"].config,
            mtp_layers=3,
            num_speculative_tokens=drafts,
            tensor_parallel_size=ranks,
            bytes_per_element=element,
            block_size_tokens=block,
            max_num_batched_tokens=batched,
            concurrent_batches=batches,
        )
        prediction = predict(shape, theirs["pool_bytes"], context)
        ours = {
            "bytes_per_block": shape.bytes_per_block,
            "least_bytes": shape.needed_bytes(context),
            # Here vLLM does not count the null block.
            "need_bytes": shape.needed_bytes(context) - shape.bytes_per_block,
            "num_gpu_blocks": prediction.num_gpu_blocks,
            "kv_cache_size_tokens": prediction.kv_cache_size_tokens,
        }
        assert ours == {name: theirs[name] for name in ours}, theirs["case"]
        assert math.isclose(prediction.kv_cache_max_concurrency, theirs["kv_cache_max_concurrency"]), theirs["case"]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_layers_are_the_ones_the_formulas_count(
    ranks: int, vllm_figures: Figures, real_footprints: dict[str | None, ModelFootprint]
) -> None:
    """vLLM's layers say themselves what they need, under FP8 and in bfloat16."""
    config = real_footprints[None].config
    heads = config.num_kv_heads // ranks
    models = vllm_figures()["models"]
    for policy, dtype in (("all-linears", "torch.uint8"), (None, "torch.bfloat16")):
        assert models[f"{policy}/{ranks}"]["specs"] == [
            f"FullAttentionSpec heads {heads} size 128 {dtype} window None",
            f"SlidingWindowSpec heads {heads} size 128 {dtype} window 512",
        ]


def test_batches_and_groups(vllm_figures: Figures) -> None:
    """Both batch counts were really planned with, and the MTP layers fill the padded places of the sliding groups."""
    found = vllm_figures()["kv"]["all-linears/4"]
    assert {entry["case"][4] for entry in found} == {1, 2}
    for entry in found:
        assert sorted(entry["groups"]) == ([12, 12, 12, 12] if entry["case"][0] else [11, 11, 11, 12])
