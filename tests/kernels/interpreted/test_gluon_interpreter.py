"""What the interpreter's tests stand on: Gluon functions without their layouts, and assembly on packed elements."""

import pytest
import torch
from gluon_interpreter import interpreted
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from step128_kernels.attention.rdna_tiles import halves, wmma

pytestmark = pytest.mark.usefixtures("amd_assembly", "bfloat16_dots", "erased_layouts")

DOUBLE = gl.constexpr(2.0)
ROWS, INNER, COLUMNS = 16, 64, 32


@gluon.jit
def doubled(x):
    rows: gl.constexpr = x.shape[0]
    return gl.convert_layout(x * DOUBLE, x.type.layout) if rows == 16 else x


@gluon.jit
def product_kernel(a_ptr, word_ptr, out_ptr, n, K: gl.constexpr, N: gl.constexpr, RDNA4: gl.constexpr):
    """``2 * a @ b`` for 16 rows; words of b ``[K / 2, N]`` hold rows 2k and 2k + 1. Columns up to n are stored."""
    scores: gl.constexpr = gl.amd.AMDWMMALayout(
        version=2 if RDNA4 else 1, transposed=True, warp_bases=[], instr_shape=[16, 16, 16]
    )
    left: gl.constexpr = gl.DotOperandLayout(0, scores, 8 if RDNA4 else 16)
    right: gl.constexpr = gl.DotOperandLayout(1, scores, 8 if RDNA4 else 16)
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, left))
    k = gl.arange(0, K // 2, layout=gl.SliceLayout(0, left))
    even = gl.load(a_ptr + row[:, None] * K + 2 * k[None, :])
    odd = gl.load(a_ptr + row[:, None] * K + 2 * k[None, :] + 1)
    word_row = gl.arange(0, K // 2, layout=gl.SliceLayout(1, right))
    word_column = gl.arange(0, N, layout=gl.SliceLayout(0, right))
    words = gl.load(word_ptr + word_row[:, None] * N + word_column[None, :])
    total = gl.zeros([16, N], gl.float32, layout=scores)
    for i in gl.static_range(K // 32):
        low, high = halves(gl.amd.slice(words, [16, N], [16 * i, 0]), RDNA4)
        total = wmma(gl.amd.slice(even, [16, 16], [0, 16 * i]), low, total, RDNA4)
        total = wmma(gl.amd.slice(odd, [16, 16], [0, 16 * i]), high, total, RDNA4)
        gl.amd.hint.sched_barrier()
    out_row = gl.arange(0, 16, layout=gl.SliceLayout(1, scores))
    column = gl.arange(0, N, layout=gl.SliceLayout(0, scores))
    offsets = out_row[:, None] * N + column[None, :]
    gl.store(out_ptr + offsets, doubled(total), mask=(out_row >= 0)[:, None] & (column < n)[None, :])


@pytest.mark.parametrize("rdna4", [True, False])
def test_a_product_through_fp8_and_wmma(amd_assembly: dict[str, int], rdna4: bool) -> None:
    """Small whole numbers, so that nothing is rounded."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-8, 9, (ROWS, INNER), generator=generator).half()
    b = torch.randint(-8, 9, (INNER, COLUMNS), generator=generator).float()
    code = b.to(torch.float8_e4m3fn).view(torch.uint8)
    words = torch.stack([code[0::2], code[1::2]], -1).view(torch.int16).squeeze(-1).contiguous()
    out = torch.full((ROWS, COLUMNS), float("nan"))
    interpreted(product_kernel)[(1, 1, 1)](a, words, out, COLUMNS - 5, K=INNER, N=COLUMNS, RDNA4=rdna4)
    assert torch.equal(out[:, :-5], 2 * (a.float() @ b)[:, :-5])
    assert out[:, -5:].isnan().all()
    assert ("v_cvt_pk_f32_fp8" in amd_assembly) == rdna4


@gluon.jit
def through_lds(x_ptr, out_ptr, STORE: gl.constexpr):
    plain: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 1], [1, 0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [0, 1])
    row = gl.arange(0, 8, layout=gl.SliceLayout(1, plain))
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, plain))
    buffer = gl.allocate_shared_memory(gl.bfloat16, [8, 16], shared)
    if STORE:
        buffer.store(gl.load(x_ptr + row[:, None] * 16 + column[None, :]))
    gl.barrier()
    half_row = gl.arange(0, 4, layout=gl.SliceLayout(1, plain))
    half = buffer.slice(4, 4, dim=0).load(plain)
    gl.store(out_ptr + half_row[:, None] * 16 + column[None, :], half)


def test_lds_holds_what_was_stored_and_nan_before() -> None:
    x, out = torch.randn(8, 16).bfloat16(), torch.zeros(4, 16).bfloat16()
    interpreted(through_lds)[(1,)](x, out, STORE=True)
    assert torch.equal(out, x[4:])
    interpreted(through_lds)[(1,)](x, out, STORE=False)
    assert out.isnan().all()


@gluon.jit
def all_words(word_ptr, low_ptr, high_ptr, N: gl.constexpr, RDNA4: gl.constexpr):
    place = gl.arange(0, N, layout=gl.BlockedLayout([2], [32], [1], [0]))
    low, high = halves(gl.load(word_ptr + place), RDNA4)
    gl.store(low_ptr + place, low)
    gl.store(high_ptr + place, high)


@pytest.mark.parametrize("rdna4", [True, False])
@pytest.mark.parametrize("step", [1, 40503])  # in order, then so that neighbours, which share a register, differ
def test_every_pair_of_fp8_bytes(rdna4: bool, step: int) -> None:
    """Elements keep their places through packed operands; only NaN, and only without gfx12's instruction, changes."""
    words = (torch.arange(65536) * step % 65536).to(torch.int16)
    low, high = torch.full((2, 65536), float("nan")).half()
    interpreted(all_words)[(1,)](words, low, high, N=65536, RDNA4=rdna4)
    right = words.view(torch.uint8).view(torch.float8_e4m3fn).half().reshape(-1, 2)
    for found, wanted in zip((low, high), right.T, strict=True):
        same = found.view(torch.int16) == wanted.contiguous().view(torch.int16)
        assert (same | (found.isnan() if rdna4 else found.abs() == 480) & wanted.isnan()).all()
