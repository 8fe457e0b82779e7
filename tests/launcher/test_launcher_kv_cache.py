"""The closed KV-cache formulas against vLLM's own functions."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from step128_launcher.model.model_config import FULL_ATTENTION
from step128_launcher.planning.kv_cache import KvShape, kv_shape, longest_context, predict

CASES = [
    # (full, sliding, window, drafted tokens of 3 MTP layers, bytes/element, block, max_num_batched_tokens, context)
    (1, 3, 64, 0, 2, 128, 1024, 4096),
    (1, 6, 64, 3, 1, 128, 1024, 4096),
    (1, 6, 64, 2, 4, 32, 64, 1000),
    (12, 33, 512, 0, 2, 128, 2048, 32768),
    (12, 36, 512, 3, 1, 16, 8192, 204800),
    (12, 36, 512, 3, 2, 64, 2048, 262144),
    (5, 6, 64, 0, 2, 32, 256, 777),
    (4, 0, 64, 0, 2, 128, 512, 4096),
    (0, 4, 64, 0, 2, 128, 512, 4096),
    (2, 1, 64, 0, 1, 32, 32, 31),
]


def retained(mtp_layers: int, drafted: int) -> int:
    """What our own rule makes of it."""
    config: Any = SimpleNamespace(
        num_hidden_layers=1,
        layer_types=(FULL_ATTENTION,) * (1 + mtp_layers),
        num_kv_heads=2,
        head_dim=64,
        sliding_window=64,
    )
    shape = kv_shape(
        config,
        mtp_layers=mtp_layers,
        num_speculative_tokens=drafted,
        tensor_parallel_size=1,
        bytes_per_element=2,
        block_size_tokens=32,
        max_num_batched_tokens=64,
        concurrent_batches=1,
    )
    return shape.retained_tokens


def vllm_lookahead(mtp_layers: int, drafted: int) -> int:
    """VllmConfig.num_prefill_lookahead_tokens for such a model, by vLLM's own code."""
    from vllm.config import SpeculativeConfig, VllmConfig

    speculative = None
    if drafted:
        speculative = SpeculativeConfig.__new__(SpeculativeConfig)
        speculative.method = "mtp"
        speculative.num_speculative_tokens = drafted
        speculative.draft_model_config = SimpleNamespace(hf_config=SimpleNamespace(num_nextn_predict_layers=mtp_layers))
    config = VllmConfig.__new__(VllmConfig)
    config.speculative_config, config.diffusion_config = speculative, None
    return int(config.num_prefill_lookahead_tokens)


@pytest.mark.parametrize(("mtp_layers", "drafted"), [(3, 0), (3, 1), (3, 2), (3, 3), (1, 1), (1, 3), (2, 3)])
def test_retained_tokens_equal_vllm(mtp_layers: int, drafted: int, vllm_modules: tuple[Any, Any, Any]) -> None:
    assert retained(mtp_layers, drafted) == max(0, vllm_lookahead(mtp_layers, drafted) - 1)


def shape_of(case: tuple[int, ...], batches: int) -> KvShape:
    full, sliding, window, drafted, element, block, batched, _ = case
    return KvShape(
        full_layers=full,
        sliding_layers=sliding,
        kv_heads_per_rank=2,
        head_dim=64,
        sliding_window=window,
        bytes_per_element=element,
        block_size_tokens=block,
        max_num_batched_tokens=batched,
        retained_tokens=retained(mtp_layers=3, drafted=drafted),
        concurrent_batches=batches,
    )


@pytest.fixture(scope="module")
def vllm_modules() -> tuple[Any, Any, Any]:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    from vllm.v1 import kv_cache_interface
    from vllm.v1.core import kv_cache_utils

    return kv_cache_utils, kv_cache_interface, torch


class FakeVllmConfig:
    """The few settings that vLLM's KV-cache planning reads (a real VllmConfig needs a model on disk)."""

    def __init__(self, case: tuple[int, ...], batches: int) -> None:
        context, drafted = case[7], case[3]
        self.max_in_flight_tokens = batches * case[6]
        self.num_prefill_lookahead_tokens = vllm_lookahead(mtp_layers=3, drafted=drafted)
        self.model_config = SimpleNamespace(max_model_len=context, original_max_model_len=context)
        self.cache_config = SimpleNamespace(
            num_gpu_blocks_override=None,
            block_size=case[5],
            kv_cache_layout="LBHNC",
            get_resolved_kv_cache_layout=self._layout,
            prefix_match_unit=None,
            prefix_cache_retention_interval=None,
        )
        self.scheduler_config = SimpleNamespace(disable_hybrid_kv_cache_manager=False)
        self.parallel_config = SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
        )
        self.speculative_config = None
        self.attention_config = SimpleNamespace(hisparse_config=None)
        self.kv_transfer_config = None

    @staticmethod
    def _layout() -> Any:
        from vllm.v1.kv_cache_interface import KVCacheLayout

        return KVCacheLayout.LBNHC


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_formulas_equal_vllm(case: tuple[int, ...], batches: int, vllm_modules: tuple[Any, Any, Any]) -> None:
    utils, interface, torch = vllm_modules
    full, sliding, window, _, element, block, _, context = case
    common = {
        "block_size": block,
        "num_kv_heads": 2,
        "head_size": 64,
        "dtype": {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32}[element],
        "kv_quant_mode": interface.get_kv_quant_mode("fp8" if element == 1 else "auto"),
    }
    specs: dict[str, Any] = {f"layers.{i}.full": interface.FullAttentionSpec(**common) for i in range(full)}
    specs |= {
        f"layers.{full + i}.sliding": interface.SlidingWindowSpec(**common, sliding_window=window)
        for i in range(sliding)
    }
    shape = shape_of(case, batches)
    memory = shape.needed_bytes(context, 3) + shape.bytes_per_block // 3
    config = FakeVllmConfig(case, batches)
    result = utils.get_kv_cache_configs(config, [specs], [memory])[0]
    tokens, concurrency = utils.get_kv_cache_capacity(config, result)
    ours = predict(shape, memory, context)
    assert (ours.num_gpu_blocks, ours.kv_cache_size_tokens) == (result.num_blocks, tokens)
    assert ours.kv_cache_max_concurrency == pytest.approx(concurrency, rel=1e-12)
    # The least that vLLM accepts for one request is exactly ours.
    utils.get_kv_cache_configs(config, [specs], [shape.needed_bytes(context)])
    with pytest.raises(ValueError, match="KV cache"):
        utils.get_kv_cache_configs(config, [specs], [shape.needed_bytes(context) - 1])


def test_published_figures_of_the_real_model() -> None:
    """4 ranks, FP8, block 16, 2048 tokens a step, async scheduling: 98,304 bytes a block, 1.25 GiB for 204,800."""
    shape = KvShape(12, 36, 2, 128, 512, 1, 16, 2048, 2, 2)
    assert shape.bytes_per_block == 98_304
    assert shape.needed_bytes(204_800) / 2**30 == pytest.approx(1.25, abs=0.01)
    assert longest_context(shape, shape.needed_bytes(204_800), 262_144) == 204_800


@pytest.mark.parametrize("case", CASES)
def test_longest_context_is_the_longest(case: tuple[int, ...]) -> None:
    shape = shape_of(case, 1)
    available = shape.needed_bytes(case[7]) - shape.bytes_per_block
    found = longest_context(shape, available, case[7])
    assert found == 0 or shape.needed_bytes(found) <= available
    assert found == case[7] or shape.needed_bytes(found + 1) > available
