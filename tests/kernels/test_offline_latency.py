"""The waiting model on real compiled kernels: rounds of loads, latencies, resident waves."""

from dataclasses import replace

import pytest

from step128_kernels.launch import Launch
from step128_kernels.nl4_gemm.configs import decode_config
from step128_kernels.nl4_gemm.launches import gemm_launch
from step128_kernels.offline.compile import compile_launch
from step128_kernels.offline.cost import DEVICES
from step128_kernels.offline.count import LaunchCount, count_launch
from step128_kernels.offline.latency import (
    CACHE_LATENCY_SECONDS,
    MEMORY_LATENCY_SECONDS,
    cached_pointers,
    ranking_seconds,
    waiting_seconds,
)

ARCHS = sorted(DEVICES)


def counted(n: int, k: int, split_k: int, arch: str) -> tuple[Launch, LaunchCount]:
    launch = gemm_launch(1, n, k, decode_config(1, 1, split_k, 32), "bf16", amd=True)
    return launch, count_launch(compile_launch(launch, arch), launch)


@pytest.mark.parametrize("arch", ARCHS)
def test_one_wave_waits_once_for_each_step_along_k(arch: str) -> None:
    """With the GPU to itself a wave of the decode kernel goes to memory K / (32 * SPLIT_K) times, one after the other;
    its activations come from memory too, since nobody else reads them.
    """
    for split_k, steps in ((1, 32), (4, 8)):
        launch, count = counted(32, 1024, split_k, arch)
        seconds = waiting_seconds(launch, count, 16.0, DEVICES[arch])
        assert steps * MEMORY_LATENCY_SECONDS <= seconds <= (2 * steps + 1) * MEMORY_LATENCY_SECONDS


@pytest.mark.parametrize("arch", ARCHS)
def test_activations_that_all_programs_read_are_cached_and_weights_are_not(arch: str) -> None:
    launch, count = counted(4096, 1024, 8, arch)
    assert cached_pointers(launch, count) == {"x_ptr"}
    alone, lonely = counted(32, 1024, 8, arch)
    assert "tiles_ptr" not in cached_pointers(alone, lonely)


@pytest.mark.parametrize("arch", ARCHS)
def test_waiting_grows_when_waves_do_not_fit_at_once(arch: str) -> None:
    launch, count = counted(1 << 17, 1024, 8, arch)
    full = waiting_seconds(launch, count, 16.0, DEVICES[arch])
    assert waiting_seconds(launch, count, 4.0, DEVICES[arch]) == pytest.approx(4 * full)
    small, few = counted(64, 1024, 8, arch)
    assert waiting_seconds(small, few, 16.0, DEVICES[arch]) == waiting_seconds(small, few, 4.0, DEVICES[arch])


def test_a_pointer_that_is_not_known_counts_as_memory() -> None:
    launch, count = counted(4096, 1024, 8, "gfx1201")
    blind = replace(count, loaded_from={})
    assert cached_pointers(launch, blind) == frozenset()
    known = waiting_seconds(launch, count, 1.0, DEVICES["gfx1201"])
    assert waiting_seconds(launch, blind, 1.0, DEVICES["gfx1201"]) >= known
    assert CACHE_LATENCY_SECONDS < MEMORY_LATENCY_SECONDS


def test_ranking_is_never_below_its_largest_part() -> None:
    assert ranking_seconds(3.0, 4.0, 0.0) == 5.0
    assert ranking_seconds(1.0, 1.0, 9.0) > 9.0
