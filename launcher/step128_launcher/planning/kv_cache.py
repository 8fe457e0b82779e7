"""How vLLM 0.32 lays out the KV cache of a model with full and sliding attention, as closed formulas.

Source: vllm/v1/core/kv_cache_utils.py and vllm/v1/kv_cache_interface.py, read; tests/launcher compares these formulas
with the results of `get_kv_cache_configs` itself.

All layers share one pool of blocks. Layers of a kind are cut into groups of equal size (the last one padded), each
group has its own block table, and one pool block holds one page of every layer of a group. One block (the null block)
is never used.
"""

from dataclasses import dataclass
from functools import cached_property

from step128_launcher.model.model_config import FULL_ATTENTION, ModelConfig


@dataclass(frozen=True)
class KvShape:
    """Everything that decides the cache's layout. `attention_layers` are the layers that have a cache."""

    full_layers: int
    sliding_layers: int
    kv_heads_per_rank: int
    head_dim: int
    sliding_window: int
    bytes_per_element: int
    block_size_tokens: int
    max_num_batched_tokens: int
    retained_tokens: int
    concurrent_batches: int

    @cached_property
    def layers_per_group(self) -> int:
        """Layers of one group: those of the rarer kind, or of the other if it has less than 1.5 times as many."""
        kinds = [count for count in (self.full_layers, self.sliding_layers) if count]
        fewest, most = min(kinds), max(kinds)
        return most if most < 1.5 * fewest else fewest

    @cached_property
    def bytes_per_block(self) -> int:
        """Bytes of one pool block on one rank: a page (K and V) for each layer of a group."""
        page = self.block_size_tokens * self.kv_heads_per_rank * 2 * self.head_dim * self.bytes_per_element
        return self.layers_per_group * page

    def sliding_blocks(self, max_model_len: int) -> int:
        """Return the blocks one request holds in one sliding group: the window, what is in flight, one for alignment.

        In flight are the tokens of every batch that may run at once; with several MTP modules the drafts' tokens are
        kept too (`retained_tokens`).
        """
        in_flight = self.concurrent_batches * self.max_num_batched_tokens
        tokens = min(self.sliding_window - 1 + self.retained_tokens + in_flight, max_model_len)
        return _ceil_div(tokens, self.block_size_tokens) + 1

    def blocks_per_request(self, max_model_len: int) -> int:
        """Return the blocks that one request of full length holds over all groups."""
        full_groups = _ceil_div(self.full_layers, self.layers_per_group)
        sliding_groups = _ceil_div(self.sliding_layers, self.layers_per_group)
        full = full_groups * _ceil_div(max_model_len, self.block_size_tokens)
        return full + (sliding_groups * self.sliding_blocks(max_model_len) if sliding_groups else 0)

    def needed_bytes(self, max_model_len: int, requests: int = 1) -> int:
        """Return the bytes on one rank for `requests` requests of full length, with the null block."""
        return (1 + requests * self.blocks_per_request(max_model_len)) * self.bytes_per_block


@dataclass(frozen=True)
class KvPrediction:
    """What vLLM will report (metric vllm:cache_config_info) for a cache of a given size."""

    num_gpu_blocks: int
    kv_cache_max_concurrency: float
    kv_cache_size_tokens: int


def predict(shape: KvShape, kv_cache_memory_bytes: int, max_model_len: int) -> KvPrediction:
    """Return vLLM's own figures for `kv_cache_memory_bytes` on one rank."""
    blocks = kv_cache_memory_bytes // shape.bytes_per_block
    concurrency = blocks / shape.blocks_per_request(max_model_len)
    return KvPrediction(blocks, concurrency, int(concurrency * max_model_len))


def longest_context(shape: KvShape, available_bytes: int, ceiling_tokens: int) -> int:
    """Return the longest context, at most `ceiling_tokens`, of which one request fits; 0 if none does."""
    if shape.needed_bytes(ceiling_tokens) <= available_bytes:
        return ceiling_tokens
    # The sliding groups' share stops growing with the context, so what is left for the full groups can be divided.
    full_groups = _ceil_div(shape.full_layers, shape.layers_per_group)
    if full_groups:
        blocks = available_bytes // shape.bytes_per_block - 1
        sliding = shape.blocks_per_request(ceiling_tokens) - full_groups * _ceil_div(
            ceiling_tokens, shape.block_size_tokens
        )
        context = (blocks - sliding) // full_groups * shape.block_size_tokens
        if context > 0 and shape.sliding_blocks(context) == shape.sliding_blocks(ceiling_tokens):
            return min(context, ceiling_tokens)
    low, high = 0, ceiling_tokens - 1
    while low < high:
        middle = (low + high + 1) // 2
        if shape.needed_bytes(middle) <= available_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def kv_shape(
    config: ModelConfig,
    *,
    mtp_layers: int,
    num_speculative_tokens: int,
    tensor_parallel_size: int,
    bytes_per_element: int,
    block_size_tokens: int,
    max_num_batched_tokens: int,
    concurrent_batches: int,
) -> KvShape:
    """Return the layout for a model served with `num_speculative_tokens` drafts a step.

    vLLM builds the cache of all MTP layers as soon as one of them drafts. `concurrent_batches` is 1 on a CPU, where
    vLLM turns async scheduling off, and 2 on a GPU.
    """
    drafting = mtp_layers if num_speculative_tokens else 0
    kinds = config.layer_types[: config.num_hidden_layers + drafting]
    full = sum(kind == FULL_ATTENTION for kind in kinds)
    several_modules = min(drafting, num_speculative_tokens) > 1
    return KvShape(
        full_layers=full,
        sliding_layers=len(kinds) - full,
        kv_heads_per_rank=max(1, config.num_kv_heads // tensor_parallel_size),
        head_dim=config.head_dim,
        sliding_window=config.sliding_window,
        bytes_per_element=bytes_per_element,
        block_size_tokens=block_size_tokens,
        max_num_batched_tokens=max_num_batched_tokens,
        retained_tokens=num_speculative_tokens - 1 if several_modules else 0,
        concurrent_batches=concurrent_batches,
    )


def group_counts(config: ModelConfig, drafting_layers: int) -> tuple[int, int]:
    """Return how many groups the full and the sliding layers are cut into, with `drafting_layers` MTP layers."""
    shape = kv_shape(
        config,
        mtp_layers=drafting_layers,
        num_speculative_tokens=drafting_layers,
        tensor_parallel_size=1,
        bytes_per_element=1,
        block_size_tokens=1,
        max_num_batched_tokens=1,
        concurrent_batches=1,
    )
    size = shape.layers_per_group
    return _ceil_div(shape.full_layers, size), _ceil_div(shape.sliding_layers, size)


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
