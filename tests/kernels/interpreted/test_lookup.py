"""Every block of AMD assembly that we ship, executed over all inputs that matter, against its portable twin."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from isa import dot2_bounds

from step128_kernels import nl4_lookup
from step128_kernels.codebook import CODEBOOK
from step128_kernels.nl4_arguments import codebook_table

CPU = torch.device("cpu")


@triton.jit
def pairs_kernel(word_ptr, out_ptr, COUNT: tl.constexpr, FP16: tl.constexpr):
    place = tl.arange(0, COUNT)
    p01, p23, p45, p67 = nl4_lookup.code_pairs(tl.load(word_ptr + place), FP16)
    tl.store(out_ptr + place * 4, p01)
    tl.store(out_ptr + place * 4 + 1, p23)
    tl.store(out_ptr + place * 4 + 2, p45)
    tl.store(out_ptr + place * 4 + 3, p67)


@triton.jit
def codes_kernel(word_ptr, codebook_ptr, out_ptr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    word = tl.load(word_ptr + place)
    for weight in tl.static_range(8):
        tl.store(out_ptr + place * 8 + weight, nl4_lookup.code(word, weight, codebook_ptr))


@triton.jit
def bytes_kernel(word_ptr, codebook_ptr, out_ptr, COUNT: tl.constexpr, AMD: tl.constexpr):
    place = tl.arange(0, COUNT)
    low, high = nl4_lookup.code_bytes(tl.load(word_ptr + place), codebook_ptr, AMD)
    tl.store(out_ptr + place * 2, low)
    tl.store(out_ptr + place * 2 + 1, high)


@triton.jit
def dot2_kernel(w_ptr, x_ptr, total_ptr, out_ptr, COUNT: tl.constexpr, FP16: tl.constexpr):
    place = tl.arange(0, COUNT)
    w, x, total = tl.load(w_ptr + place), tl.load(x_ptr + place), tl.load(total_ptr + place)
    tl.store(out_ptr + place, nl4_lookup.dot2(w, x, total, FP16))


@triton.jit
def permute_kernel(high_ptr, low_ptr, selector_ptr, out_ptr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    high, low = tl.load(high_ptr + place), tl.load(low_ptr + place)
    tl.store(out_ptr + place, nl4_lookup.permute(high, low, tl.load(selector_ptr + place)))


def all_words() -> torch.Tensor:
    """1024 words in which each of the four bytes takes every value beside different neighbours."""
    byte = np.arange(256, dtype=np.uint32)
    rows = [[byte, byte[::-1], np.roll(byte, 7), byte ^ 0x5A][turn:] for turn in range(4)]
    rows = [row + [byte, byte[::-1], np.roll(byte, 7), byte ^ 0x5A][:turn] for turn, row in enumerate(rows)]
    words = np.concatenate([a | b << 8 | c << 16 | d << 24 for a, b, c, d in rows])
    return torch.from_numpy(words.view(np.int32).copy())


def codes_by_hand(words: torch.Tensor) -> np.ndarray:
    """[words, 8], codes over 128: weight j (0..3) is byte j's low nibble, weight j + 4 its high nibble."""
    each = words.numpy().view(np.uint8).reshape(-1, 4)
    return np.asarray(CODEBOOK)[np.concatenate((each & 15, each >> 4), axis=1)] / 128


def test_portable_codes() -> None:
    words = all_words()
    out = torch.full((words.numel(), 8), float("nan"))
    codes_kernel[(1,)](words, codebook_table(CPU), out, COUNT=words.numel())
    assert np.array_equal(out.numpy(), codes_by_hand(words))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_code_pairs(amd_assembly: dict[str, int], dtype: torch.dtype) -> None:
    words = all_words()
    out = torch.zeros(words.numel(), 4, dtype=torch.int32)
    pairs_kernel[(1,)](words, out, COUNT=words.numel(), FP16=dtype == torch.float16)
    assert np.array_equal(out.view(dtype).float().numpy(), codes_by_hand(words))
    assert amd_assembly == {"v_perm_b32": 16}  # and 7 of the compiler's: 23 for 8 weights


@pytest.mark.parametrize("amd", [False, True])
def test_code_bytes(amd_assembly: dict[str, int], amd: bool) -> None:
    words = all_words()
    out = torch.zeros(words.numel(), 2, dtype=torch.int32)
    bytes_kernel[(1,)](words, codebook_table(CPU), out, COUNT=words.numel(), AMD=amd)
    assert np.array_equal((out.numpy().view(np.uint8) - 128.0) / 128, codes_by_hand(words))
    assert amd_assembly == ({"v_perm_b32": 6} if amd else {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot2_of_every_code_with_every_activation(amd_assembly: dict[str, int], dtype: torch.dtype) -> None:
    """Code times activation is exact in float32, in either half; NaN and infinity come through."""
    x16 = torch.arange(1 << 16, dtype=torch.int32)
    activation = x16.to(torch.int16).view(dtype).double()
    count = 1 << 16
    total = torch.zeros(count)
    for code in (entry / 128 for entry in CODEBOOK):
        bits = int(torch.tensor([code, 0.0], dtype=dtype).view(torch.int32)[0])
        product = activation * code
        for shift in (0, 16):
            w = torch.full((count,), bits << shift, dtype=torch.int64).to(torch.int32)
            x = (x16.to(torch.int64) << shift).to(torch.int32)
            out = torch.full((count,), float("nan"))
            dot2_kernel[(1,)](w, x, total, out, COUNT=count, FP16=dtype == torch.float16)
            # Below float32's normal range a GPU may flush: such products are nothing beside any real sum.
            normal = (product.abs() >= 2.0**-126) | (product == 0)
            assert torch.equal(out.double()[normal].nan_to_num(7e77), product.float().double()[normal].nan_to_num(7e77))
    assert set(amd_assembly) == {"v_dot2_f32_f16" if dtype == torch.float16 else "v_dot2_f32_bf16"}


@pytest.mark.parametrize("kind, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_dot2_of_pairs_lies_within_what_the_document_allows(amd_assembly, kind: str, dtype: torch.dtype) -> None:
    """And the portable twin, in whatever order it adds, lies within the rounding of two float32 additions of it."""
    generator = torch.Generator().manual_seed(0)
    count = 1 << 14
    codes = (torch.tensor(CODEBOOK) / 128).to(dtype)
    w = codes[torch.randint(0, 16, (count, 2), generator=generator)]
    x = (torch.randn(count, 2, generator=generator) * 4).to(dtype)
    total = torch.randn(count, generator=generator) * 100
    out = torch.full((count,), float("nan"))
    dot2_kernel[(1,)](w.view(torch.int32).flatten(), x.view(torch.int32).flatten(), total, out, COUNT=count,
                      FP16=kind == "f16")  # fmt: skip
    words = [part.contiguous().view(torch.int32).numpy().view(np.uint32).ravel() for part in (w, x, total)]
    least, most = dot2_bounds(*words, kind)
    assert ((out.numpy() >= least) & (out.numpy() <= most)).all()
    products = w.double() * x.double()
    magnitude = products.abs().sum(1) + total.double().abs()
    assert ((out.double() - products.sum(1) - total.double()).abs() <= magnitude * 2.0**-23).all()


def test_wrong_assembly_does_not_pass(amd_assembly, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sources of the permute swapped, as a slip would: the look-up gives other codes."""
    monkeypatch.setattr(nl4_lookup, "PERMUTE", tl.constexpr("v_perm_b32 $0, $2, $1, $3"))
    words = all_words()
    out = torch.zeros(words.numel(), 2, dtype=torch.int32)
    bytes_kernel[(1,)](words, codebook_table(CPU), out, COUNT=words.numel(), AMD=True)
    assert not np.array_equal((out.numpy().view(np.uint8) - 128.0) / 128, codes_by_hand(words))


@pytest.mark.parametrize(
    "wrong", ["v_dot2_f32_f16 $0, $1, $2, $3", "v_dot2_f32_bf16 $0, $1, $1, $3", "v_dot2_f32_bf16 $0, $1, $2, $2"]
)
def test_wrong_dot_products_do_not_pass(amd_assembly, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """The other type's instruction, or an operand taken twice."""
    monkeypatch.setattr(nl4_lookup, "DOT2_BFLOAT16", tl.constexpr(wrong))
    w = torch.tensor([1.0, 0.5], dtype=torch.bfloat16).view(torch.int32)
    x = torch.tensor([3.0, -2.0], dtype=torch.bfloat16).view(torch.int32)
    out = torch.full((1,), float("nan"))
    dot2_kernel[(1,)](w, x, torch.tensor([10.0]), out, COUNT=1, FP16=False)
    assert out.item() != 12.0


def test_permute_takes_the_low_word_first(amd_assembly) -> None:
    high, low = (torch.tensor([word], dtype=torch.int32) for word in (0x77665544, 0x33221100))
    selector = torch.tensor([0x00050207], dtype=torch.int32)
    out = torch.zeros(1, dtype=torch.int32)
    permute_kernel[(1,)](high, low, selector, out, COUNT=1)
    assert out.item() == 0x00552277
