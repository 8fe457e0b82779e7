"""The expert kernels in Triton's interpreter against the torch reference, and the blocks they work on."""

import pytest
import torch

from step128_kernels.nl4_gemm.configs import decode_config, prefill_config
from step128_kernels.nl4_layout import to_kernel_layout
from step128_kernels.nl4_moe import triton_moe
from step128_kernels.nl4_moe.align import LARGEST_ALIGNED_PAIRS, ExpertBlocks, align_by_sorting, most_blocks
from step128_kernels.nl4_moe.configs import joint_config
from step128_kernels.nl4_moe.launches import MoeShape
from step128_kernels.nl4_moe.reference import nl4_moe_reference

EXPERTS, INTERMEDIATE, HIDDEN, TOP_K = 5, 48, 80, 2
CONFIGS = {
    "decode 1": joint_config(decode_config(1, 2, 2, 32), decode_config(1, 4, 1, 32)),
    "decode 4": joint_config(decode_config(4, 2, 2, 32), decode_config(4, 1, 2, 16)),
    "prefill": joint_config(prefill_config(16, 32, 32, 2, 1), prefill_config(16, 64, 32, 4, 1)),
}
# Eleven experts over ranks; this one holds five of them, in another order.
EXPERT_MAP = torch.tensor([-1, 3, -1, 1, 2, -1, -1, 0, 4, -1, -1], dtype=torch.int32)


def routing(tokens: int, experts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts per token, never the last one; weights that do not add up to 1."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts - 1, generator=generator)[:TOP_K] for _ in range(tokens)])
    return torch.rand(tokens, TOP_K, generator=generator) + 0.1, ids.to(torch.int32)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that the host wrapper allocates starts as NaN, or as numbers of pairs that do not exist."""
    empty = torch.empty

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 1 << 30)

    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: poison(empty(*sizes, **options)))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "tokens, expert_map, limit",
    [
        (1, None, 1.5),
        (1, EXPERT_MAP, None),
        (3, None, None),
        (3, EXPERT_MAP, 1.5),
        (17, None, 1.5),
        (17, EXPERT_MAP, 1.5),
    ],
    ids=["1", "1 of a rank", "3", "3 of a rank", "17", "17 of a rank"],
)
def test_experts(quantized, poisoned, tokens: int, dtype: torch.dtype, name: str, expert_map, limit) -> None:
    gate_up, down = quantized(EXPERTS, 2 * INTERMEDIATE, HIDDEN), quantized(EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    weights, ids = routing(tokens, EXPERTS if expert_map is None else len(EXPERT_MAP))
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    y = triton_moe.nl4_moe_triton(
        x, *to_kernel_layout(*gate_up), *to_kernel_layout(*down), weights, ids, INTERMEDIATE, limit, expert_map,
        CONFIGS[name],
    )  # fmt: skip
    wanted = nl4_moe_reference(x.double(), *gate_up, *down, weights, ids, limit, expert_map)
    assert not y.isnan().any()
    # Rounded to the dtype: the hidden values, in prefill also weights and partial sums, and the result. Relative to
    # the largest value, since a sum of terms of both signs has no relative accuracy of its own.
    eps = torch.finfo(dtype).eps
    assert (y.double() - wanted).abs().max() <= 4 * eps * wanted.abs().max() + 1e-5


def nl4_experts(quantized, experts: int, intermediate: int, hidden: int) -> tuple[tuple, tuple]:
    """Gate-and-up and down as a checkpoint stores them."""
    return quantized(experts, 2 * intermediate, hidden), quantized(experts, hidden, intermediate, seed=1)


@pytest.mark.parametrize("expert_map", [None, EXPERT_MAP], ids=["all experts", "expert map"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 5, 90], ids=["1", "5", "90, sorted"])
def test_rows_of_padding_are_nobodys(quantized, poisoned, tokens: int, name: str, expert_map) -> None:
    """vLLM pads a batch to a captured size with rows whose experts are all -1; while capturing, all rows are such."""
    gate_up, down = nl4_experts(quantized, EXPERTS, 16, 32)
    weights, ids = routing(tokens, EXPERTS if expert_map is None else len(EXPERT_MAP))
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(0))
    x[-1] = float("nan")  # what padding holds does not matter
    for padded in (slice(tokens - 1, None), slice(0, None)):
        ids[padded] = -1
        y = triton_moe.nl4_moe_triton(
            x, *to_kernel_layout(*gate_up), *to_kernel_layout(*down), weights, ids, 16, None, expert_map, CONFIGS[name]
        )
        assert (y[padded] == 0).all()
        if tokens > 1:
            wanted = nl4_moe_reference(x[:-1].double(), *gate_up, *down, weights[:-1], ids[:-1], None, expert_map)
            torch.testing.assert_close(y[:-1], wanted.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_that_blocks_fill_exactly(quantized, poisoned, name: str) -> None:
    """As all shipped shapes do, and so without masks; with three experts a token, int64 ids and a rank's share."""
    gate_up, down = nl4_experts(quantized, EXPERTS, 64, 128)
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(len(EXPERT_MAP), generator=generator)[:3] for _ in range(4)])
    weights = torch.rand(4, 3, generator=generator)
    x = torch.randn(4, 128, generator=generator).half()
    y = triton_moe.nl4_moe_triton(
        x, *to_kernel_layout(*gate_up), *to_kernel_layout(*down), weights, ids, 64, 1.5, EXPERT_MAP, CONFIGS[name]
    )
    wanted = nl4_moe_reference(x.double(), *gate_up, *down, weights, ids, 1.5, EXPERT_MAP)
    assert (y.double() - wanted).abs().max() <= 4 * torch.finfo(x.dtype).eps * wanted.abs().max()


def test_the_clamp_keeps_nan(quantized) -> None:
    gate_up, down = nl4_experts(quantized, EXPERTS, 16, 32)
    weights, ids = routing(1, EXPERTS)
    x = torch.full((1, 32), float("nan"))
    y = triton_moe.nl4_moe_triton(
        x, *to_kernel_layout(*gate_up), *to_kernel_layout(*down), weights, ids, 16, 7.0, None, CONFIGS["decode 1"]
    )
    assert y.isnan().all()


def test_wrong_columns_are_refused(quantized) -> None:
    gate_up, down = nl4_experts(quantized, EXPERTS, 16, 64)
    weights, ids = routing(1, EXPERTS)
    with pytest.raises(ValueError, match="2 column tiles"):
        triton_moe.nl4_moe_triton(
            torch.zeros(1, 128), *to_kernel_layout(*gate_up), *to_kernel_layout(*down), weights, ids, 16, None
        )


def test_experts_with_amd_assembly(quantized, poisoned, amd_assembly, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call with the assembly executed gives the portable path's result, up to the order of additions."""
    gate_up, down = quantized(EXPERTS, 2 * INTERMEDIATE, HIDDEN), quantized(EXPERTS, HIDDEN, INTERMEDIATE, seed=1)
    weights, ids = routing(3, EXPERTS)
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0)).half()
    arguments = (x, *to_kernel_layout(*gate_up), *to_kernel_layout(*down), weights, ids, INTERMEDIATE, 1.5, None)
    for name in ("decode 4", "prefill"):
        portable = triton_moe.nl4_moe_triton(*arguments, CONFIGS[name])
        assert not amd_assembly
        with monkeypatch.context() as patch:
            patch.setattr(triton_moe, "uses_assembly", lambda _: True)
            y = triton_moe.nl4_moe_triton(*arguments, CONFIGS[name])
        assert "v_perm_b32" in amd_assembly
        amd_assembly.clear()
        torch.testing.assert_close(y, portable, rtol=2e-3, atol=2e-3)


def by_expert(blocks: ExpertBlocks) -> dict[int, list[int]]:
    """Pairs of each expert; checks what every list of blocks must be."""
    found: dict[int, list[int]] = {}
    for expert, pairs in zip(blocks.experts.tolist(), blocks.pairs.tolist(), strict=True):
        if expert < 0:
            continue
        real = [pair for pair in pairs if pair != -1]
        assert real == pairs[: len(real)] and real
        found.setdefault(expert, []).extend(real)
    return {expert: sorted(pairs) for expert, pairs in found.items()}


@pytest.mark.parametrize("expert_map", [None, EXPERT_MAP], ids=["all experts", "expert map"])
@pytest.mark.parametrize("block_m", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 7, 40, LARGEST_ALIGNED_PAIRS // TOP_K])
def test_align_kernel_makes_the_blocks_that_sorting_makes(poisoned, tokens: int, block_m: int, expert_map) -> None:
    _, ids = routing(tokens, len(EXPERT_MAP))
    experts = len(EXPERT_MAP) if expert_map is None else EXPERTS
    config = {"phase": "decode", "BLOCK_M": block_m}
    shape = MoeShape(tokens, TOP_K, experts, HIDDEN, INTERMEDIATE, has_map=expert_map is not None)
    if block_m == 1 and expert_map is None:
        assert triton_moe.make_blocks(shape, config, ids, None).experts is ids  # nothing to align
        return
    made = triton_moe.make_blocks(shape, config, ids, expert_map)
    sorted_ = align_by_sorting(ids, block_m, experts, expert_map)
    wanted: dict[int, list[int]] = {}
    for pair, expert in enumerate(ids.flatten().tolist()):
        local = expert if expert_map is None else int(expert_map[expert])
        if local >= 0:
            wanted.setdefault(local, []).append(pair)
    assert by_expert(made) == by_expert(sorted_) == wanted
    used = sum(-(-len(pairs) // block_m) for pairs in wanted.values())
    assert int((made.experts >= 0).sum()) == int((sorted_.experts >= 0).sum()) == used


def test_most_blocks_is_enough_and_not_far_from_it() -> None:
    """The worst routing: every expert but one has just begun a block. One block more than that is the most to spare."""
    for pairs, block_m, experts in ((16, 4, 3), (7, 4, 7), (1000, 16, 240), (5, 1, 2), (4096, 64, 240)):
        busy = min(pairs, experts)
        worst = busy - 1 + -(-(pairs - busy + 1) // block_m)
        assert worst <= most_blocks(pairs, block_m, experts) <= max(worst, pairs // block_m + busy)
        assert block_m > 1 or most_blocks(pairs, block_m, experts) == pairs
