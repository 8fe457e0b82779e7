"""The judge of all kernels: right results pass, plausible mistakes do not."""

import logging
import math

import pytest
import torch

from step128_kernels.testing import assert_close, compare, poisoned, tolerance, unwritten_is_nan

K = 4096
BF16 = {"rounded_to": torch.bfloat16, "terms": K}


@pytest.fixture(scope="module")
def product() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, K, generator=generator).bfloat16().float()
    weight = torch.randn(256, K, generator=generator).bfloat16().float()
    return x, weight, x @ weight.T


def test_roundings_that_a_right_kernel_makes_pass(product: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    x, weight, right = product
    rounded = (x @ (weight * 1.1).bfloat16().float().T / 1.1).bfloat16()
    found = compare(rounded, right, **BF16)
    assert found.problem is None
    assert found.typical > found.typical_allowed / 5, "the tolerance is far too wide"


def test_one_wrong_group_of_sixteen_weights_is_seen(product: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    x, weight, right = product
    wrong = weight.clone()
    wrong[7, 32:48] = 0
    assert "times as far off" in (compare((x @ wrong.T).bfloat16(), right, **BF16).problem or "")


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_a_wrong_factor_is_seen(factor: float, product: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    assert "typical error" in (compare(product[2] * factor, product[2], **BF16).problem or "")


def test_a_small_row_is_not_hidden_behind_a_large_one() -> None:
    right = torch.ones(2, 64) * torch.tensor([[1e4], [1.0]])
    wrong = right.clone()
    wrong[1, 3] = 1.2
    assert compare(wrong, right, **BF16).problem is not None


def test_a_row_of_zeros_must_be_zero() -> None:
    right = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert compare(right.clone(), right, **BF16).problem is None
    assert compare(right + torch.tensor([[0.0], [1e-9]]), right, **BF16).problem is not None


def test_unwritten_values_never_pass() -> None:
    right = torch.zeros(2, 4)
    assert "8 of 8 values are not finite" in (compare(poisoned(2, 4, dtype=torch.float16), right, **BF16).problem or "")
    assert "the reference itself" in (compare(right, right * math.nan, **BF16).problem or "")
    assert "shape (2, 3)" in (compare(right[:, :3], right, **BF16).problem or "")


def test_buffers_of_a_kernel_are_poisoned_and_the_setting_restored() -> None:
    with unwritten_is_nan():
        assert bool(torch.empty(1000, dtype=torch.bfloat16).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_tolerances_follow_the_types() -> None:
    by_type = [tolerance(dtype, K, 2) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert by_type == sorted(by_type) and by_type[0] < 1e-5 and by_type[2] < 6e-3
    assert tolerance(torch.bfloat16, K, 6) == pytest.approx(math.sqrt(3) * by_type[2], rel=1e-3)


def test_the_number_is_logged_and_the_error_says_it(caplog: pytest.LogCaptureFixture) -> None:
    right = torch.ones(1, 16)
    with caplog.at_level(logging.INFO, "step128_kernels.testing"):
        assert_close(right, right, **BF16, name="toy")
        with pytest.raises(AssertionError, match=r"toy: typical error 0\.5 "):
            assert_close(right * 1.5, right, **BF16, name="toy")
    assert "toy: typical error 0 of 0.00553 allowed" in caplog.text
