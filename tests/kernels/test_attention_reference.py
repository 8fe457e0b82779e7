"""Page order, the torch reference of paged attention, and the sizes that rooms agree on."""

import pytest
import torch
from isa import assembles
from torch.nn.functional import scaled_dot_product_attention

from step128_kernels.attention import MOST_SPLIT_ROWS, paged_attention, scratch_elements, update_kv_cache
from step128_kernels.attention import fp8 as blocks
from step128_kernels.attention.configs import DEFAULT, PORTABLE, choose, decode_config
from step128_kernels.attention.launches import decode_launches, prefill_launches, target_of, used_splits
from step128_kernels.attention.page_order import places
from step128_kernels.attention.shape import AttentionCall, AttentionShape

ONE = torch.tensor(1.0)
LAYER = AttentionShape(16, 2, 128, 0, 16, "fp8", "bf16")


def test_page_order_by_hand() -> None:
    """Two granules of head size 32; worked out from the description at the top of page_order.py."""
    key, value = places(32, 32, fp8=True)
    assert [int(key[0, d]) for d in (0, 1, 15, 16)] == [0, 1, 15, 256]
    assert [int(key[i, 0]) for i in (1, 15, 16)] == [16, 240, 1024]
    assert [int(value[i, 0]) for i in (0, 8, 1, 9, 15, 16)] == [512, 513, 514, 515, 527, 1536]
    assert int(value[0, 1]) == 528
    key, value = places(16, 32, fp8=False)
    assert [int(key[0, d]) for d in (0, 7, 8)] == [0, 7, 128]
    assert int(key[3, 9]) == (16 + 3) * 8 + 1
    assert [int(value[i, 2]) for i in (0, 15)] == [512 + 32, 512 + 47]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("page, head_dim", [(16, 64), (48, 128), (64, 256)])
def test_every_place_of_a_page_is_taken_once(page: int, head_dim: int, fp8: bool) -> None:
    taken = torch.cat([where.reshape(-1) for where in places(page, head_dim, fp8)])
    assert torch.equal(taken.sort().values, torch.arange(page * 2 * head_dim))


def filled(dtype: torch.dtype, context: int, page: int = 16, heads: int = 2, head_dim: int = 64, poison: float = 0.0):
    """A cache whose one sequence lies in pages in reverse order, and what was stored."""
    generator = torch.Generator().manual_seed(context)
    key, value = (torch.randn(context, heads, head_dim, generator=generator).bfloat16() for _ in range(2))
    pages = -(-context // page)
    cache = torch.full((pages + 2, heads, page, 2 * head_dim), poison).to(dtype)
    table = torch.arange(pages, 0, -1, dtype=torch.int32)[None, :]
    token = torch.arange(context)
    slots = table[0, token // page].long() * page + token % page
    update_kv_cache(key, value, cache, slots, ONE, ONE)
    return key, value, cache, table


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("tokens, context", [(1, 1), (1, 50), (5, 50), (50, 50)])
def test_the_reference_is_torchs_attention(tokens: int, context: int, window: int) -> None:
    key, value, cache, table = filled(torch.bfloat16, context, poison=float("nan"))
    query = torch.randn(tokens, 8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = torch.full((tokens, 8, 64), float("nan"))
    paged_attention(
        query, cache, table, torch.tensor([context]), torch.tensor([0, tokens]), scale=0.125, window=window,
        k_scale=ONE, v_scale=ONE, max_query_tokens=tokens, max_context_tokens=context, out=out,
    )  # fmt: skip
    position, number = torch.arange(context - tokens, context)[:, None], torch.arange(context)[None, :]
    sees = (number <= position) & ((number > position - window) if window else torch.tensor(True))
    q, k, v = (x.float().transpose(0, 1)[None] for x in (query, key, value))
    wanted = scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=0.125, enable_gqa=True)
    torch.testing.assert_close(out, wanted[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_fp8_values_are_stored_over_their_scale() -> None:
    """Saturated at 448, rounded to nearest even; what is read back is the stored value times the scale."""
    key = torch.tensor([[[0.5, -1e9, 17.0 * 0.5, 19.0 * 0.5]]]).repeat(1, 1, 16)
    cache = torch.zeros(1, 1, 16, 128).to(torch.float8_e4m3fn)
    update_kv_cache(key, key, cache, torch.tensor([0]), torch.tensor(0.5), ONE)
    stored = cache.view(-1).float()[places(16, 64, True)[0][0]]
    assert stored[:4].tolist() == [1.0, -448.0, 16.0, 20.0]


def test_padding_is_not_stored_and_missing_queries_are_passed_over() -> None:
    cache = torch.zeros(2, 1, 16, 128).to(torch.float8_e4m3fn)
    update_kv_cache(torch.ones(3, 1, 64), torch.ones(3, 1, 64), cache, torch.tensor([-1, -1]), ONE, ONE)
    assert not cache.float().any()
    out = torch.full((1, 4, 64), 7.0)
    paged_attention(
        torch.ones(1, 4, 64), cache, torch.zeros(2, 1, dtype=torch.int32), torch.tensor([0, 0]),
        torch.tensor([0, 0, 0]), scale=1.0, window=0, k_scale=ONE, v_scale=ONE, max_query_tokens=1,
        max_context_tokens=16, out=out,
    )  # fmt: skip
    assert (out == 7).all()


@pytest.mark.parametrize("change, problem", [
    ({"heads": 34}, "the ratio must be 1 to 16"),
    ({"head_dim": 96}, "known are 64, 128, 256"),
    ({"page": 24}, "no multiple of 16"),
    ({"kv_dtype": "fp16"}, "needs queries of fp16"),
    ({"element": "fp32"}, "take bf16 and fp16"),
    ({"window": -1}, "0 means none"),
])  # fmt: skip
def test_layers_that_the_kernels_do_not_serve(change: dict, problem: str) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match=problem):
        replace(LAYER, **change)


@pytest.mark.parametrize("sequences", [1, 3, 8, 64, 200, 2000])
@pytest.mark.parametrize("tokens", [1, 4, 8, 33])
def test_partial_results_fit_the_scratch(sequences: int, tokens: int) -> None:
    """Whatever the config: splits are given up, at last the launch that sums them too."""
    call = AttentionCall(LAYER, sequences, tokens, 65536)
    for splits in (1, 16, 256):
        launches = decode_launches(call, decode_config(splits, 2), "rdna4")
        partial, mass = (launches[0].pointers[name].size_bytes for name in ("partial_ptr", "mass_ptr"))
        if used_splits(call, splits) > 1:
            assert (partial + mass) <= 4 * scratch_elements(LAYER.heads, LAYER.head_dim)
            assert len(launches) == 2 and not launches[0].constants["DIRECT"]
        else:
            assert len(launches) == 1 and launches[0].constants["DIRECT"]
    assert scratch_elements(24, 128) == MOST_SPLIT_ROWS * 24 * 129


def test_grids_do_not_depend_on_lengths() -> None:
    """So that a captured graph serves any: with one config, two contexts give the same launches but for strides."""
    for make, tokens, config in ((decode_launches, 4, DEFAULT[1]), (prefill_launches, 64, DEFAULT[512])):
        short, long = (make(AttentionCall(LAYER, 2, tokens, context), config, "rdna4") for context in (512, 200_000))
        assert [one.grid for one in short] == [one.grid for one in long]
        assert [one.constants for one in short] == [one.constants for one in long]


def test_targets_and_their_kernels() -> None:
    assert [target_of(arch) for arch in ("gfx1201", "gfx1151", "gfx942", "")] == [
        "rdna4",
        "rdna3",
        "portable",
        "portable",
    ]
    wide = AttentionCall(AttentionShape(8, 2, 256, 0, 16, "bf16", "bf16"), 1, 1, 1024)
    assert decode_launches(wide, DEFAULT[1], "rdna4")[0].function.__name__ == "attention_paged_kernel"
    with pytest.raises(ValueError, match="BLOCK_M = 16 x num_warps"):
        prefill_launches(AttentionCall(LAYER, 1, 64, 64), PORTABLE[512] | {"num_warps": 2}, "rdna4")


def test_a_cpu_gets_the_portable_defaults() -> None:
    cpu = torch.device("cpu")
    assert choose(LAYER, 1, 4, 5000, cpu) == PORTABLE[1]
    assert choose(LAYER, 1, 9, 5000, cpu) == PORTABLE[512]


@pytest.mark.parametrize("text, constraints, archs", [
    (blocks.RDNA4_TO_PAIRS.value, blocks.RDNA4_TO_PAIRS_CONSTRAINTS.value, ("gfx1201",)),
    (blocks.TO_HALVES.value, blocks.TO_HALVES_CONSTRAINTS.value, ("gfx1201", "gfx1151")),
    (blocks.RDNA3_TO_HALVES.value, blocks.RDNA3_TO_HALVES_CONSTRAINTS.value, ("gfx1151",)),
])  # fmt: skip
def test_the_assembler_takes_every_block(text: str, constraints: str, archs: tuple[str, ...]) -> None:
    for arch in archs:
        assert assembles(text, constraints, arch) is None
