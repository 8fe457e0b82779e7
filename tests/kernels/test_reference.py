"""The torch references agree with the format and with plain arithmetic."""

import numpy as np
import pytest
import torch

from step128_kernels import codebook, torch_codebook
from step128_kernels.nl4_gemm import nl4_gemm
from step128_kernels.nl4_gemm import reference as gemm_reference
from step128_kernels.nl4_moe import nl4_moe
from step128_kernels.nl4_moe.reference import clamped_swiglu, route


def quantized(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.1
    packed, scale = codebook.quantize(weight)
    return torch.from_numpy(packed), torch.from_numpy(scale)


def test_torch_dequantize_is_bit_exact() -> None:
    packed, scale = quantized(3, 7, 48)
    wanted = codebook.dequantize(packed.numpy(), scale.numpy())
    assert np.array_equal(torch_codebook.dequantize(packed, scale).numpy(), wanted)


def test_gemm_in_blocks_equals_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, scale = quantized(37, 64)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    whole = nl4_gemm(x, packed, scale)
    monkeypatch.setattr(gemm_reference, "_ROWS_PER_BLOCK", 8)
    torch.testing.assert_close(nl4_gemm(x, packed, scale), whole, rtol=1e-6, atol=1e-6)


def test_router_bias_chooses_but_does_not_weigh() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    weights, ids = route(logits, torch.tensor([9.0, 0.0, 0.0, 0.0]), top_k=2, renormalize=True, scaling_factor=3.0)
    chosen = dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
    first, last = torch.tensor(0.0).sigmoid(), torch.tensor(3.0).sigmoid()
    assert chosen == pytest.approx({0: float(3 * first / (first + last)), 3: float(3 * last / (first + last))})


def test_swiglu_clamps_the_gate_after_silu_and_the_product_never() -> None:
    gate_up = torch.tensor([[9.0, -9.0, 8.0, -8.0]])
    assert clamped_swiglu(gate_up, 7.0)[0].tolist() == pytest.approx([49.0, 7 * 9 / (1 + np.exp(9))])
    assert clamped_swiglu(gate_up, None)[0, 0].item() == pytest.approx(72 / (1 + np.exp(-9)))


@pytest.mark.parametrize("limit", [None, 0.05])
def test_moe_equals_a_sum_over_tokens(limit: float | None) -> None:
    experts, hidden, intermediate, tokens = 5, 32, 16, 9
    gate_up = quantized(experts, 2 * intermediate, hidden, seed=1)
    down = quantized(experts, hidden, intermediate, seed=2)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, hidden, generator=generator)
    weights, ids = route(torch.randn(tokens, experts, generator=generator), None, 2, True, 3.0)
    wanted = torch.zeros_like(x)
    for token in range(tokens):
        for weight, expert in zip(weights[token], ids[token], strict=True):
            h = clamped_swiglu(x[token] @ torch_codebook.dequantize(*(t[expert] for t in gate_up)).T, limit)
            wanted[token] += weight * (torch_codebook.dequantize(*(t[expert] for t in down)) @ h)
    got = nl4_moe(x, *gate_up, *down, weights, ids, limit)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)  # float32 sums in another order


def test_expert_map_splits_the_sum_over_ranks() -> None:
    experts, hidden, intermediate = 4, 32, 16
    gate_up = quantized(experts, 2 * intermediate, hidden, seed=1)
    down = quantized(experts, hidden, intermediate, seed=2)
    x = torch.randn(6, hidden, generator=torch.Generator().manual_seed(0))
    weights, ids = route(torch.randn(6, experts, generator=torch.Generator().manual_seed(1)), None, 2, True, 1.0)
    whole = nl4_moe(x, *gate_up, *down, weights, ids, None)
    halves = torch.zeros_like(x)
    for rank in range(2):
        held = slice(2 * rank, 2 * rank + 2)
        expert_map = torch.full((experts,), -1)
        expert_map[held] = torch.arange(2)
        local = [tensor[held] for tensor in (*gate_up, *down)]
        halves += nl4_moe(x, *local, weights, ids, None, expert_map)
    torch.testing.assert_close(halves, whole, rtol=1e-5, atol=1e-6)
