"""Attention over many combinations of sizes, the kernels against their twin, and the host wrapper's own arguments."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_runs import PREFILL, Batch, check_result, decode, error, launched, layer, made_up
from gluon_interpreter import interpreted
from triton.experimental.gluon._runtime import GluonJITFunction

from step128_kernels.attention import MOST_SPLIT_ROWS, scratch_elements, triton_attention
from step128_kernels.attention.configs import DEFAULT, PORTABLE
from step128_kernels.attention.reference import paged_attention_reference, update_kv_cache_reference
from step128_kernels.launch import Launch
from step128_kernels.run_launch import run

pytestmark = pytest.mark.usefixtures("amd_assembly", "bfloat16_dots", "erased_layouts")

# Every value of one size meets every value of another somewhere in COMBINATIONS.
SIZES: dict[str, list[Any]] = {
    "tokens": [1, 2, 4, 8, 9, 33],
    "context": [1, 15, 16, 17, 65, 512, 513, 541],
    "page": [16, 32, 48, 64],
    "ratio": [1, 8, 12, 16],
    "window": [0, 16, 33, 512],
    "kv": ["fp8", "bf16", "fp16"],
    "splits": [1, 2, 7, 16],
    "least_tiles": [1, 2, 5],
    "block_n": [32, 64],
    "warps": [4, 8],
}


def covering(sizes: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Few combinations that hold every pair of values: greedily the best of some random ones."""
    source, names = random.Random(0), list(sizes)
    missing = {(a, x, b, y) for i, a in enumerate(names) for b in names[i + 1 :] for x in sizes[a] for y in sizes[b]}

    def pairs(one: dict[str, Any]) -> set[tuple[Any, ...]]:
        return {(a, one[a], b, one[b]) for i, a in enumerate(names) for b in names[i + 1 :]}

    chosen: list[dict[str, Any]] = []
    while missing:
        a, x, b, y = min(missing, key=repr)
        tries = [{name: source.choice(values) for name, values in sizes.items()} | {a: x, b: y} for _ in range(40)]
        chosen.append(max(tries, key=lambda one: len(pairs(one) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


COMBINATIONS = covering(SIZES)


def batch_of(one: dict[str, Any], seed: int) -> Batch:
    """One sequence, of at least as many keys as queries."""
    shape = layer(one["ratio"], one["window"], one["page"], one["kv"])
    return made_up(shape, [(one["tokens"], max(one["tokens"], one["context"]))], seed)


@pytest.mark.parametrize("number", range(len(COMBINATIONS)))
def test_combinations(number: int) -> None:
    """Each through one of the kernels and the twin, which cut the work alike: their results are close to each other."""
    one = COMBINATIONS[number]
    batch = batch_of(one, number)
    config = decode(one["splits"], one["block_n"], one["least_tiles"])
    prefill = PREFILL | {"BLOCK_M": 16 * one["warps"], "BLOCK_N": one["block_n"], "num_warps": one["warps"]}
    target = "rdna4" if number % 2 else "rdna3"
    found = launched(batch, config, prefill, target, True)
    check_result(batch, found, target)
    twin = launched(batch, config, prefill, "portable", False)
    check_result(batch, twin, "portable")
    # A wave takes 64 keys only of one page, and the twin takes a prefill's tiles that need a mask last. Where the tiles
    # are the same in the same order, so is nearly every bit.
    if one["tokens"] <= 8 and (one["page"] % one["block_n"] == 0 or one["block_n"] == 32):
        assert error(found, twin.float()) < 3e-4


@pytest.fixture(params=["rdna4", "rdna3", "portable"])
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The host wrapper as on a GPU of a target; its Gluon kernels run in the interpreter."""

    def run_interpreted(launch: Launch, tensors: dict[str, torch.Tensor]) -> None:
        if isinstance(launch.function, GluonJITFunction):
            launch = replace(launch, function=interpreted(launch.function))
        run(launch, tensors)

    monkeypatch.setattr(triton_attention, "target_of", lambda arch: request.param)
    monkeypatch.setattr(triton_attention, "run", run_interpreted)
    configs = PORTABLE if request.param == "portable" else DEFAULT
    few, many = configs[1] | {"SPLITS": 8}, configs[512]
    monkeypatch.setattr(triton_attention, "choose", lambda shape, n, tokens, *_: many if tokens > 8 else few)
    triton_attention._call_launches.cache_clear()
    return str(request.param)


@pytest.fixture
def guarded() -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """A NaN buffer of a size, and what lies around it."""

    def make(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.full((size + 4096,), float("nan"))
        return whole[2048:-2048], whole

    return make


@pytest.mark.parametrize("kv", ["fp8", "bf16"])
def test_the_host_wrapper(on: str, kv: str, guarded: Callable[[int], tuple[torch.Tensor, torch.Tensor]]) -> None:
    """As vLLM calls it: queries, keys and values are slices of one projection, the cache is one layer of several,
    graphs pad the batch with sequences of no query and rows of no sequence; a decode, a verification, a prefill.
    """
    shape = layer(8, 40, 32, kv, kv_heads=2)
    sequences = [(1, 90), (4, 33), (20, 61)]
    old = made_up(shape, sequences, seed=3)
    rows, size = int(old.starts[-1]), shape.heads * shape.head_dim
    width = size + 2 * shape.kv_heads * shape.head_dim
    fused = torch.randn(rows + 3, width, generator=torch.Generator().manual_seed(5)).bfloat16()
    query = fused[:, :size].unflatten(1, (shape.heads, shape.head_dim))
    key, value = fused[:, size:].unflatten(1, (2, shape.kv_heads, shape.head_dim)).unbind(1)
    layers = torch.zeros(len(old.cache), 3, *old.cache.shape[1:], dtype=torch.uint8 if kv == "fp8" else old.cache.dtype)
    cache = layers.view(old.cache.dtype)[:, 1]
    layers[:, 1] = old.cache.view(layers.dtype)
    slots = torch.full((rows + 2,), -1)
    for i, (tokens, context) in enumerate(sequences):
        position = torch.arange(context - tokens, context)
        page = old.table[i, position // shape.page].long()
        slots[old.starts[i] : old.starts[i + 1]] = page * shape.page + position % shape.page
    scales = {"k_scale": old.k_scale, "v_scale": old.v_scale}
    right = cache.clone()
    update_kv_cache_reference(key, value, right, slots, **scales)
    triton_attention.update_kv_cache_triton(key, value, cache, slots, **scales)
    assert torch.equal(cache.view(torch.uint8), right.view(torch.uint8))
    assert not layers[:, ::2].any()

    lengths = torch.cat([old.lengths, torch.zeros(2, dtype=torch.int32)])
    starts = torch.cat([old.starts, old.starts[-1:].repeat(2)])
    table = torch.cat([old.table, torch.zeros_like(old.table[:2])])
    wanted = torch.full(query.shape, float("nan"))
    common = {"scale": 0.2, "window": shape.window, **scales}
    paged_attention_reference(query, right, table, lengths, starts, **common, out=wanted)
    out = torch.full(query.shape, 7.0).bfloat16()
    scratch, around = guarded(scratch_elements(shape.heads, shape.head_dim))
    triton_attention.paged_attention_triton(
        query, cache, table, lengths, starts, **common, max_query_tokens=20, max_context_tokens=100, out=out,
        scratch=scratch,
    )  # fmt: skip
    assert (out[rows:] == 7).all() and around[:2048].isnan().all() and around[-2048:].isnan().all()
    assert error(out[:rows], wanted[:rows]) < 4e-3  # rounding the result to bfloat16 is 2e-3


def test_as_many_splits_as_the_scratch_has_room_for(on: str, guarded: Callable[[int], Any]) -> None:
    """The most rows that splits serve, and one sequence more: whose launch then writes the result itself."""
    for count in (MOST_SPLIT_ROWS // (8 * 2), MOST_SPLIT_ROWS // 8):
        shape = layer(1, 0, 16)
        batch = made_up(shape, [(8, 80)] * 2, seed=1)
        empty = count - 2
        starts = torch.cat([batch.starts, batch.starts[-1:].repeat(empty)])
        lengths = torch.cat([batch.lengths, torch.zeros(empty, dtype=torch.int32)])
        table = torch.cat([batch.table, batch.table[:1].expand(empty, -1)])
        out = torch.full_like(batch.query, float("nan"))
        scratch, around = guarded(scratch_elements(shape.heads, shape.head_dim))
        triton_attention.paged_attention_triton(
            batch.query, batch.cache, table, lengths, starts, scale=batch.scale, window=0, k_scale=batch.k_scale,
            v_scale=batch.v_scale, max_query_tokens=8, max_context_tokens=80, out=out, scratch=scratch,
        )  # fmt: skip
        check_result(batch, out, on)
        assert around[:2048].isnan().all() and around[-2048:].isnan().all()
        assert scratch.isnan().all() == (count == MOST_SPLIT_ROWS // 8)
