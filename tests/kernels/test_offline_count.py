"""Trip counts: kernels whose loaded bytes and WMMAs follow from arithmetic, on both architectures."""

import pytest
from offline_kernels import (
    ARCHES,
    BLOCK,
    by_memory,
    by_program,
    counted_loop,
    either_way,
    fixed_loop,
    launch,
    product,
    tail_loop,
    triangle,
)

from step128_kernels.errors import CountingError
from step128_kernels.launch import Launch
from step128_kernels.offline.asm import parse_assembly
from step128_kernels.offline.compile import compile_launch
from step128_kernels.offline.cost import instruction_mix, loaded_bytes
from step128_kernels.offline.count import LaunchCount, count_launch
from step128_kernels.offline.scalar import WaveRunner

TILE_BYTES = BLOCK * 4


def count(launch: Launch, arch: str) -> LaunchCount:
    return count_launch(compile_launch(launch, arch), launch)


def tiles(launch: Launch, arch: str) -> float:
    """Tiles of x that the whole launch loads, however the compiler unrolled the loops."""
    return sum(loaded_bytes(count(launch, arch)).get("x_ptr", {}).values()) / TILE_BYTES


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("n", [1, 37])
def test_loop_with_a_constant_bound(arch: str, n: int) -> None:
    assert tiles(launch(fixed_loop, constants={"N": n}, grid=(3, 1, 1)), arch) == 3 * n


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 16, 1000])
def test_loop_with_a_run_time_bound(arch: str, n: int) -> None:
    assert tiles(launch(counted_loop, {"n": n}, grid=(5, 1, 1)), arch) == 5 * n


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("size", "expected"), [(1024, 8), (1025, 9), (3, 1)])
def test_masked_tail_is_a_whole_iteration(arch: str, size: int, expected: int) -> None:
    assert tiles(launch(tail_loop, {"size": size}), arch) == expected


@pytest.mark.parametrize("arch", ARCHES)
def test_nested_loops(arch: str) -> None:
    assert tiles(launch(triangle, {"n": 13}), arch) == 13 * 12 / 2


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("columns", [1, 3, 16])
def test_programs_that_differ_are_all_counted(arch: str, columns: int) -> None:
    grid, limit = (40, 3, 2), 30
    expected = sum(x // columns + y + z for x in range(limit) for y in range(3) for z in range(2))
    found = count(launch(by_program, {"columns": columns, "limit": limit}, grid=grid), arch)
    assert sum(loaded_bytes(found)["x_ptr"].values()) / TILE_BYTES == expected
    assert sum(waves for _, waves in found.classes) == found.waves == 240
    assert not found.assumptions


@pytest.mark.parametrize("arch", ARCHES)
def test_leaving_out_what_no_branch_reads_changes_nothing(arch: str) -> None:
    one = launch(by_program, {"columns": 3, "limit": 30}, grid=(40, 3, 2), num_warps=2)
    compiled = compile_launch(one, arch)
    runner = WaveRunner(parse_assembly(compiled.assembly), arch, one, compiled.arguments)
    for program in [(0, 0, 0), (29, 2, 1), (30, 0, 0)]:
        every, deciding = (runner.run(program, 1, {}, addresses=addresses) for addresses in (True, False))
        assert every == deciding


@pytest.mark.parametrize("arch", ARCHES)
def test_programs_that_cannot_differ_are_run_once(arch: str) -> None:
    found = count(launch(counted_loop, {"n": 7}, grid=(1 << 30, 7, 3), num_warps=4), arch)
    assert len(found.classes) == 1
    assert found.waves == (1 << 30) * 7 * 3 * 4


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("num_warps", [1, 4])
def test_every_wave_is_counted(arch: str, num_warps: int) -> None:
    one = launch(counted_loop, {"n": 6}, {"BLOCK": 512}, grid=(2, 1, 1), num_warps=num_warps)
    assert sum(loaded_bytes(count(one, arch))["x_ptr"].values()) == 2 * 6 * 512 * 4


@pytest.mark.parametrize("arch", ARCHES)
def test_bound_from_memory_is_taken_from_the_launch(arch: str) -> None:
    assert tiles(launch(by_memory, grid=(4, 1, 1), loads={"count_ptr": 11}), arch) == 44
    assert tiles(launch(by_memory, grid=(4, 1, 1), loads={"count_ptr": (5, 0, 9, 2)}), arch) == 16


@pytest.mark.parametrize("arch", ARCHES)
def test_bound_from_memory_that_nobody_gave_is_an_error(arch: str) -> None:
    with pytest.raises(CountingError, match=r"a load from count_ptr.*Launch\.loads"):
        count(launch(by_memory, grid=(4, 1, 1)), arch)
    with pytest.raises(CountingError, match=r"element 2 of count_ptr is loaded; 2 are given"):
        count(launch(by_memory, grid=(4, 1, 1), loads={"count_ptr": (1, 2)}), arch)


def test_loads_of_no_pointer_are_an_error() -> None:
    with pytest.raises(CountingError, match="cuont_ptr"):
        count(launch(by_memory, loads={"cuont_ptr": 1}), "gfx1201")


@pytest.mark.parametrize("arch", ARCHES)
def test_branch_on_memory_takes_the_longer_way_and_says_so(arch: str) -> None:
    found = count(launch(either_way), arch)
    assert sum(loaded_bytes(found)["x_ptr"].values()) == 5 * TILE_BYTES
    assert any("a load from flag_ptr" in text for text in found.assumptions)
    known = count(launch(either_way, loads={"flag_ptr": 0}), arch)
    assert sum(loaded_bytes(known)["x_ptr"].values()) == TILE_BYTES
    assert not known.assumptions


@pytest.mark.parametrize("arch", ARCHES)
def test_wmma_count_follows_from_the_shape(arch: str) -> None:
    inner = 352
    one = launch(
        product,
        {"K": inner},
        {"BM": 32, "BN": 64, "BK": 32},
        num_warps=2,
        dtypes={"a_ptr": "fp16", "b_ptr": "fp16"},
        grid=(3, 1, 1),
    )
    assert instruction_mix(count(one, arch))["wmma"] == 3 * (32 // 16) * (64 // 16) * (inner // 16)
