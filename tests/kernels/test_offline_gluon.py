"""Gluon kernels, float32 arguments and strides beyond 32 bits, in the offline tools."""

from dataclasses import replace

import pytest
from offline_kernels import ARCHES
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from step128_kernels.launch import Launch, Pointer
from step128_kernels.offline.compile import compile_key, compile_launch, specialize
from step128_kernels.offline.cost import loaded_bytes
from step128_kernels.offline.count import count_launch

BLOCK, LENGTH = 128, 11


@gluon.jit
def scaled_sum(x_ptr, lengths_ptr, out_ptr, scale, stride, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    lane = gl.arange(0, BLOCK, layout=layout)
    total = gl.zeros([BLOCK], gl.float32, layout=layout)
    for i in range(gl.load(lengths_ptr + gl.program_id(0))):
        total += gl.load(x_ptr + i * stride + lane) * scale
    gl.store(out_ptr + gl.program_id(0) * BLOCK + lane, total)


def launch(stride: int = 1 << 33, scale: float = 0.125) -> Launch:
    return Launch(
        name="scaled_sum",
        function=scaled_sum,
        pointers={
            "x_ptr": Pointer("fp32", 1 << 40),
            "lengths_ptr": Pointer("i32", 16),
            "out_ptr": Pointer("fp32", 2048),
        },
        scalars={"scale": scale, "stride": stride},
        constants={"BLOCK": BLOCK},
        grid=(4, 1, 1),
        num_warps=1,
        loads={"lengths_ptr": (LENGTH, 0, 3, 1)},
    )


@pytest.mark.parametrize("arch", ARCHES)
def test_a_gluon_kernel_is_compiled_and_counted(arch: str) -> None:
    one = launch()
    count = count_launch(compile_launch(one, arch), one)
    # "?": a 64-bit address in vector registers is not followed to its argument; nothing else is loaded by vectors.
    assert loaded_bytes(count) == {"?": {128: (LENGTH + 0 + 3 + 1) * BLOCK * 4}}
    assert not count.assumptions


@pytest.mark.parametrize("arch", ARCHES)
def test_float_arguments_are_float32_and_long_strides_64_bits(arch: str) -> None:
    found = specialize(launch(), arch)
    assert (found.signature["scale"], found.signature["stride"]) == ("fp32", "i64")
    assert specialize(launch(stride=256), arch).signature["stride"] == "i32"


def test_another_scale_is_the_same_code() -> None:
    one = launch()
    assert compile_key(one, "gfx1201") == compile_key(launch(scale=1.0), "gfx1201")
    assert compile_key(one, "gfx1201") != compile_key(launch(stride=256), "gfx1201")
    assert compile_key(one, "gfx1201") == compile_key(replace(one, loads={"lengths_ptr": 7}), "gfx1201")
