"""FP8 conversions in plain Triton over all inputs; those by assembly are in test_gluon_interpreter.py."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from step128_kernels.attention.fp8 import bytes_to_halves, float_to_byte, pairs_to_floats


@triton.jit
def all_words(word_ptr, low_ptr, high_ptr, N: tl.constexpr):
    place = tl.arange(0, N)
    low, high = bytes_to_halves(tl.load(word_ptr + place))
    tl.store(low_ptr + place, low)
    tl.store(high_ptr + place, high)


def test_every_pair_of_bytes_becomes_its_values() -> None:
    """Bit for bit, but NaN becomes 480 or -480, as gfx11's assembly makes of it."""
    words = torch.arange(65536).to(torch.int16)
    low, high = torch.full((2, 65536), float("nan")).half()
    all_words[(1,)](words, low, high, N=65536)
    code = words.view(torch.uint8).reshape(-1, 2)
    value = code.view(torch.float8_e4m3fn).half()
    large = torch.tensor(480.0).half()
    value = torch.where(value.isnan(), torch.where(code >= 128, -large, large), value)
    for found, wanted in zip((low, high), value.T, strict=True):
        assert torch.equal(found.view(torch.int16), wanted.contiguous().view(torch.int16))


@triton.jit
def to_bytes(x_ptr, out_ptr, N: tl.constexpr):
    place = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + place, float_to_byte(tl.load(x_ptr + place)).to(tl.uint8))


def test_float32_becomes_the_nearest_byte() -> None:
    """Every code, every middle of two and its neighbours, every bfloat16 and float16: as torch rounds them."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = np.sort(codes[codes.isfinite()].numpy())
    middles = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(x, np.float32(to)) for x in (grid, middles) for to in (1e3, -1e3)]
    special = np.array([464, -464, 465, 1e30, 1e-45, -1e-45, -0.0], np.float32)
    words = torch.arange(65536).to(torch.int16)
    halves = [words.view(dtype).float().numpy() for dtype in (torch.bfloat16, torch.float16)]
    x = torch.from_numpy(np.concatenate([grid, middles, *beside, special, *halves]).astype(np.float32))
    x = torch.nn.functional.pad(x, (0, -len(x) % 4096))
    found = torch.empty(len(x), dtype=torch.uint8)
    to_bytes[(len(x) // 4096,)](x, found, N=4096)
    wanted = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(found, wanted.where(~x.isnan(), torch.tensor(0x7F, dtype=torch.uint8)))


@triton.jit
def to_floats(word_ptr, low_ptr, high_ptr, N: tl.constexpr, ELEMENT: tl.constexpr):
    place = tl.arange(0, N)
    low, high = pairs_to_floats(tl.load(word_ptr + place), ELEMENT)
    tl.store(low_ptr + place, low)
    tl.store(high_ptr + place, high)


@pytest.mark.parametrize("element, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_pairs_of_16_bits_become_floats(element: str, dtype: torch.dtype) -> None:
    pairs = torch.stack([torch.arange(65536), torch.arange(65536) * 40503 % 65536], 1).to(torch.int16)
    low, high = torch.full((2, 65536), 7.0)
    to_floats[(1,)](pairs.view(torch.int32), low, high, N=65536, ELEMENT=element)
    right = pairs.view(dtype).float()
    for found, wanted in zip((low, high), right.T, strict=True):
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
