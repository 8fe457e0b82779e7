"""The linear kernels in Triton's interpreter against float64, at awkward shapes."""

import numpy as np
import pytest
import torch

from step128_kernels import codebook
from step128_kernels.nl4_arguments import ELEMENTS, codebook_table
from step128_kernels.nl4_gemm.configs import decode_config, prefill_config
from step128_kernels.nl4_gemm.launches import gemm_launch
from step128_kernels.nl4_layout import to_kernel_layout
from step128_kernels.run_launch import run

DECODE = [decode_config(1, 1, 1, 32), decode_config(4, 2, 4, 32), decode_config(8, 1, 2, 16)]
PREFILL = [prefill_config(16, 32, 32, 2, 1), prefill_config(32, 64, 64, 4, 1)]
# rows of x, rows of W, columns: none that blocks fill, K of 16 (half a tile) among them; the last fills them all, as
# the shipped shapes do
SHAPES = [(1, 48, 64), (3, 40, 48), (17, 40, 80), (2, 16, 16), (4, 64, 128)]


def compute(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, config: dict, amd: bool) -> torch.Tensor:
    """y of one launch; the output is poisoned and lies in the middle of a poisoned buffer that must stay as it is."""
    m, n = x.shape[0], packed.shape[0]
    tiles, scales = to_kernel_layout(packed, scale)
    guard = torch.full((m + 2, n), float("nan"), dtype=x.dtype)
    y = guard[1:-1]
    launch = gemm_launch(m, n, x.shape[1], config, ELEMENTS[x.dtype], amd)
    table = codebook_table(x.device)
    run(launch, {"x_ptr": x, "tiles_ptr": tiles, "scales_ptr": scales, "codebook_ptr": table, "y_ptr": y})
    assert guard[0].isnan().all() and guard[-1].isnan().all()
    return y


def exact(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 ``x @ W.T`` and the sum of the magnitudes of its terms."""
    weight = torch.from_numpy(codebook.dequantize(packed.numpy(), scale.numpy())).double()
    return x.double() @ weight.T, x.double().abs() @ weight.abs().T


def check(y: torch.Tensor, wanted: torch.Tensor, magnitude: torch.Tensor, weight_rounding: float = 0.0) -> None:
    """The result is rounded once to its dtype; sums in float32 lose at most a few ulp of the terms' magnitudes; the
    prefill kernels also round each weight to the activations' dtype.
    """
    assert not y.isnan().any()
    allowed = wanted.abs() * torch.finfo(y.dtype).eps + magnitude * (16 * 2.0**-24 + weight_rounding)
    worst = ((y.double() - wanted).abs() / allowed).max().item()
    assert worst <= 1, f"{worst:.2f} times the allowed error"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", DECODE, ids=str)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_decode(quantized, m: int, n: int, k: int, config: dict, dtype: torch.dtype) -> None:
    packed, scale = quantized(n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    check(compute(x, packed, scale, config, amd=False), *exact(x, packed, scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", DECODE, ids=str)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_decode_with_amd_assembly(
    quantized, amd_assembly, m: int, n: int, k: int, config: dict, dtype: torch.dtype
) -> None:
    packed, scale = quantized(n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    check(compute(x, packed, scale, config, amd=True), *exact(x, packed, scale))
    dot = "v_dot2_f32_f16" if dtype == torch.float16 else "v_dot2_f32_bf16"
    assert set(amd_assembly) == {"v_perm_b32", dot}


# bfloat16 is left to the test below: the interpreter of Triton 3.9 multiplies its bits as integers in tl.dot.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("config", PREFILL, ids=str)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_prefill(quantized, m: int, n: int, k: int, config: dict, dtype: torch.dtype) -> None:
    packed, scale = quantized(n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    check(compute(x, packed, scale, config, amd=False), *exact(x, packed, scale), torch.finfo(dtype).eps)


@pytest.mark.parametrize("config", PREFILL, ids=str)
def test_prefill_with_amd_assembly(quantized, amd_assembly, config: dict) -> None:
    packed, scale = quantized(40, 80)
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(0)).half()
    y = compute(x, packed, scale, config, amd=True)
    assert torch.equal(y, compute(x, packed, scale, config, amd=False))
    assert set(amd_assembly) == {"v_perm_b32"}


@pytest.mark.parametrize("amd", [False, True])
def test_prefill_rounds_weights_to_bfloat16(
    quantized, amd_assembly, monkeypatch: pytest.MonkeyPatch, amd: bool
) -> None:
    """The weights of the bfloat16 path: with the identity for x, each product is one weight, rounded to bfloat16."""
    from triton.runtime import interpreter

    def dot(builder, a, b, d, precision, most):
        wide = [(part.data.astype(np.uint32) << 16).view(np.float32) for part in (a, b)]
        return interpreter.TensorHandle(np.matmul(*wide) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    packed, scale = quantized(48, 64)
    y = compute(torch.eye(64).bfloat16(), packed, scale, PREFILL[0], amd)
    weight = torch.from_numpy(codebook.dequantize(packed.numpy(), scale.numpy()))
    # Ties go away from zero instead of to even: the two differ by one unit in the last place there, and only there.
    away = ((weight.view(torch.int32) + 0x8000) & -65536).view(torch.float32)
    assert torch.equal(y.T.float(), away)


def test_infinite_activation_beyond_k_does_not_leak(quantized) -> None:
    """K is half a tile: the lanes of the other half must not read the next row."""
    packed, scale = quantized(16, 48)
    x = torch.randn(2, 48)
    x[1] = float("inf")
    for config in (DECODE[1], PREFILL[0]):
        y = compute(x, packed, scale, config, amd=False)
        assert y[0].isfinite().all()


def test_float32_is_refused_by_the_assembly(quantized) -> None:
    with pytest.raises(ValueError, match="16-bit activations"):
        gemm_launch(1, 16, 32, DECODE[0], "fp32", amd=True)


def test_nan_of_any_kind_stays_nan(quantized) -> None:
    """NVIDIA's own NaN is 0x7fffffff, which rounds to -0 when it is rounded as a number."""
    packed, scale = quantized(16, 32)
    for bits in (0x7FFFFFFF, -1, 0x7FC00000):
        x = torch.tensor([bits], dtype=torch.int32).view(torch.float32).expand(1, 32).contiguous()
        assert compute(x.bfloat16(), packed, scale, DECODE[0], amd=False).isnan().all()
        assert compute(x, packed, scale, DECODE[0], amd=False).isnan().all()
