"""The attention kernels in Triton's interpreter against float32: the RDNA kernels' own source, and their twin."""

import pytest
import torch
from attention_runs import KINDS, PREFILL, bf16_path, check, decode, error, expected, launched, layer, made_up

from step128_kernels.attention.cache_update import cache_update_kernel
from step128_kernels.attention.launches import update_launch
from step128_kernels.attention.reference import update_kv_cache_reference
from step128_kernels.run_launch import run

TWO_KINDS = [KINDS[0], KINDS[2]]  # where nothing but the conversion of FP8 would differ
pytestmark = pytest.mark.usefixtures("amd_assembly", "bfloat16_dots", "erased_layouts")


@pytest.mark.parametrize("target, gluon", KINDS)
@pytest.mark.parametrize("tokens, page", [(1, 16), (2, 32), (4, 16), (8, 32), (33, 16), (33, 32)])
def test_query_lengths(tokens: int, page: int, target: str, gluon: bool) -> None:
    check(made_up(layer(page=page), [(tokens, 150)], seed=tokens), 4, target, gluon)


@pytest.mark.parametrize("target, gluon", TWO_KINDS)
@pytest.mark.parametrize("window", [0, 512])
@pytest.mark.parametrize("context", [1, 15, 16, 511, 512, 513])
def test_contexts(context: int, window: int, target: str, gluon: bool) -> None:
    check(made_up(layer(window=window), [(1, context)], seed=context), 3, target, gluon)


@pytest.mark.parametrize("target, gluon", TWO_KINDS)
@pytest.mark.parametrize("ratio, window", [(8, 0), (12, 512)])
def test_a_long_context_at_the_models_head_size(ratio: int, window: int, target: str, gluon: bool) -> None:
    check(made_up(layer(ratio, window, head_dim=128), [(4, 5000)]), 8, target, gluon)


@pytest.mark.parametrize("target, gluon", TWO_KINDS)
@pytest.mark.parametrize("ratio, window, page", [(8, 0, 16), (12, 40, 16), (8, 40, 48)])
def test_a_ragged_batch_of_decodes_verifications_and_prefills(
    ratio: int, window: int, page: int, target: str, gluon: bool
) -> None:
    sequences = [(1, 1), (20, 70), (4, 130), (2, 16), (12, 12), (8, 65)]
    check(made_up(layer(ratio, window, page, kv_heads=2), sequences), 2, target, gluon)


@pytest.mark.parametrize("target, gluon", KINDS)
@pytest.mark.parametrize("kv, page", [("bf16", 16), ("fp16", 64)])
def test_caches_of_16_bits(kv: str, page: int, target: str, gluon: bool) -> None:
    check(made_up(layer(12, 40, page, kv), [(4, 90), (1, 130), (20, 50)]), 3, target, gluon)


@pytest.mark.parametrize("target, gluon", KINDS)
@pytest.mark.parametrize("kv", ["fp8", "bf16"])
def test_wide_tiles(kv: str, target: str, gluon: bool) -> None:
    """64 keys a tile, which lie in one page; a prefill's may lie in several."""
    check(made_up(layer(8, 0, 64, kv), [(4, 200)]), 2, target, gluon, 64)
    batch = made_up(layer(8, 0, 16, kv), [(20, 200)])
    found = launched(batch, decode(1), {**PREFILL, "BLOCK_N": 64}, target, gluon)
    assert error(found, expected(batch)) <= error(bf16_path(batch), expected(batch))


@pytest.mark.parametrize("target, gluon", KINDS)
def test_one_split_writes_the_output_itself(target: str, gluon: bool) -> None:
    check(made_up(layer(), [(2, 100)]), 1, target, gluon)


@pytest.mark.parametrize("target, gluon", TWO_KINDS)
@pytest.mark.parametrize("spread", [1e-3, 30.0])
def test_scores_near_zero_and_far_apart(spread: float, target: str, gluon: bool) -> None:
    """Flat: every key counts, each with little. Sharp: one key takes all."""
    batch = made_up(layer(kv="bf16" if spread < 1 else "fp8"), [(1, 300)], spread=min(spread, 4.0))
    batch.query *= spread
    check(batch, 4, target, gluon)


@pytest.mark.parametrize("ratio", [1, 5, 16])
def test_other_ratios(ratio: int) -> None:
    check(made_up(layer(ratio), [(3, 100)]), 2, "rdna4", True)


def test_a_sequence_without_a_query_is_passed_over() -> None:
    """As vLLM pads a batch to the size of a captured graph."""
    batch = made_up(layer(), [(1, 40), (1, 20)])
    batch.starts = torch.tensor([0, 1, 1], dtype=torch.int32)
    batch.lengths[1] = 0
    out = launched(batch, decode(2), PREFILL, "rdna4", True)
    assert not out[0].isnan().any() and out[1].isnan().all()


def test_a_wrong_mask_or_scale_is_seen() -> None:
    """The checks above can fail: one key too many, a scale 2 % off."""
    batch = made_up(layer(), [(1, 40)])
    wanted = expected(batch)
    batch.v_scale = batch.v_scale * 1.02
    found = launched(batch, decode(2), PREFILL, "rdna4", True)
    assert error(found, wanted) > error(bf16_path(batch), wanted)
    batch = made_up(layer(window=16), [(1, 40)])
    wanted = expected(batch)
    batch.shape = layer(window=17)  # the cache before the window is NaN
    assert not (error(launched(batch, decode(2), PREFILL, "rdna4", True), wanted) < 0.05)


INTERESTING = [0.0, -0.0, 1.0, 448.0, 449.0, -1e6, 464.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-9, 2.0**-6, 0.9999 * 2.0**-6]
INTERESTING += [17.0, 17.5, 18.0, 19.0, float("inf"), float("-inf"), float("nan"), 2.0**-20, 240.0, 0.0175]


@pytest.mark.parametrize("kv", ["fp8", "bf16"])
@pytest.mark.parametrize("page", [16, 48])
def test_new_tokens_are_stored_bit_for_bit_as_the_reference_stores_them(kv: str, page: int) -> None:
    shape = layer(2, 0, page, kv, kv_heads=2)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(9, 2, 64, generator=generator) * 40 for _ in range(2))
    key[0, 0, : len(INTERESTING)] = torch.tensor(INTERESTING)
    value[1, 1, : len(INTERESTING)] = torch.tensor(INTERESTING)
    key, value = key.bfloat16(), value.bfloat16()
    slots = torch.tensor([3, page + 15, -1, 2 * page + 9, page, 0, -1, page + 7])  # fewer than tokens
    dtype = torch.uint8 if kv == "fp8" else torch.bfloat16
    found, wanted = (torch.full((3, 2, page, 128), 85).to(dtype) for _ in range(2))
    scales = torch.tensor(1.0), torch.tensor(0.7)
    update_kv_cache_reference(key, value, wanted.view(torch.float8_e4m3fn) if kv == "fp8" else wanted, slots, *scales)
    launch = update_launch(len(slots), shape)
    assert launch.function is cache_update_kernel
    tensors = {"key_ptr": key, "value_ptr": value, "cache_ptr": found, "slots_ptr": slots}
    run(launch, tensors | {"k_scale_ptr": scales[0], "v_scale_ptr": scales[1]})
    same = found.view(torch.uint8) == wanted.view(torch.uint8)
    nan = ((found.view(torch.uint8) & 0x7F) == 0x7F) & ((wanted.view(torch.uint8) & 0x7F) == 0x7F)
    assert (same | nan).all() if kv == "fp8" else same.all()
    assert (found.float() != 85).any()


@pytest.mark.parametrize("kv, tokens, window", [("fp8", 4, 0), ("bf16", 1, 32), ("fp8", 9, 0)])
def test_what_tune_and_the_gpu_test_run_is_right(kv: str, tokens: int, window: int) -> None:
    from step128_kernels.attention.runner import attention_runner
    from step128_kernels.attention.shape import AttentionCall

    config = PREFILL if tokens > 8 else decode(3)
    kernel, reference = attention_runner(AttentionCall(layer(4, window, kv=kv), 2, tokens, 90), config, device="cpu")
    wanted = reference()
    assert error(kernel(), wanted) < 3e-3 and not wanted.isnan().any()
