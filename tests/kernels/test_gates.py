"""Gates of the shipped kernels: every config that we ship is compiled for both GPUs, counted, and held to these."""

from collections.abc import Iterator

import pytest

from step128_kernels.cases import ARCHS, SHAPES, all_cases, case
from step128_kernels.errors import KernelToolError
from step128_kernels.launch import KernelCase
from step128_kernels.nl4_gemm.configs import decode_config
from step128_kernels.offline.inspect import Report, case_title
from step128_kernels.offline.parallel import inspect_cases
from step128_kernels.vllm_plugin.baselines import baseline_case

LEAST_WAVES_PER_SIMD = 8
MOST_VALU_PER_WEIGHT = {1: 4.0, 4: 6.0, 8: 8.0}
"""Of decode, up to so many rows: prologue, alignment, reductions and addresses included."""


def problems(report: Report) -> list[str]:
    """Which gates a shipped case misses."""
    found = []
    if report.spills or report.scratch_bytes:
        found.append(f"{report.spills} spilled registers, {report.scratch_bytes} scratch bytes")
    if report.load_bits["tiles_ptr"] != 128:
        found.append(f"weights are loaded by {report.load_bits['tiles_ptr']} bits")
    if report.case.phase == "prefill":
        return [*found, *([] if report.wmma else ["no WMMA"])]
    if report.waves_per_simd < LEAST_WAVES_PER_SIMD:
        found.append(f"{report.waves_per_simd} waves per SIMD")
    rows = report.case.shape["M"]
    limit = next((most for upto, most in MOST_VALU_PER_WEIGHT.items() if rows <= upto), None)
    if limit is not None and report.valu_per_weight > limit:
        found.append(f"{report.valu_per_weight:.2f} vector instructions per weight, {limit} allowed")
    return found


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    """Every shipped case of both GPUs."""
    found = inspect_cases(list(all_cases()))
    failed = [str(result) for result in found if isinstance(result, KernelToolError)]
    assert not failed, failed[:5]
    return [result for result in found if isinstance(result, Report)]


def of_kind(reports: list[Report], kernel: str, phase: str, arch: str) -> list[Report]:
    return [r for r in reports if (r.case.kernel, r.case.phase, r.case.arch) == (kernel, phase, arch)]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("kernel", list(SHAPES))
def test_every_shipped_config_passes_the_gates(reports: list[Report], kernel: str, phase: str, arch: str) -> None:
    mine = of_kind(reports, kernel, phase, arch)
    shapes = {tuple((name, size) for name, size in r.case.shape.items() if name != "M") for r in mine}
    assert shapes == {tuple(shape.items()) for shape in SHAPES[kernel]}
    missed = {case_title(report.case): found for report in mine if (found := problems(report))}
    assert not missed, f"{len(missed)} of {len(mine)}: {list(missed.items())[:8]}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", list(SHAPES))
def test_decode_is_bound_by_memory_not_by_instructions(reports: list[Report], kernel: str, arch: str) -> None:
    """Up to four rows, of all weights that a call can read at once: what instructions allow exceeds the card's
    bandwidth wherever there are enough of them to fill it.
    """
    large = [r for r in of_kind(reports, kernel, "decode", arch) if r.case.memory_bytes > 4e6]
    assert large
    slow = [case_title(r.case) for r in large if r.case.shape["M"] <= 4 and r.share_of_bandwidth < 1]
    assert not slow


def compared() -> Iterator[tuple[KernelCase, KernelCase]]:
    """Ours, as shipped, and vLLM's int4 kernel at the shapes of tensor parallelism 4."""
    for arch in ARCHS:
        for ours in all_cases(arch):
            sizes = {name: size for name, size in ours.shape.items() if name != "M"}
            if sizes in ({"N": 2560, "K": 4096}, {"E": 240, "N": 320, "K": 4096, "top_k": 8}) and ours.shape["M"] in (
                *MOST_VALU_PER_WEIGHT,
            ):
                yield ours, baseline_case(ours.kernel, sizes, ours.shape["M"], arch)


def test_fewer_instructions_than_vllm() -> None:
    """Compiled in the same run; per weight, since vLLM's groups of 32 make 4.5 bits and ours of 16 make 5."""
    pairs = list(compared())
    assert len(pairs) == 2 * 2 * len(MOST_VALU_PER_WEIGHT)
    found = inspect_cases([one for pair in pairs for one in pair])
    for ours, theirs in zip(found[::2], found[1::2], strict=True):
        assert isinstance(ours, Report) and isinstance(theirs, Report), (ours, theirs)
        valu = theirs.valu_per_weight / ours.valu_per_weight
        seconds = theirs.modelled_seconds / ours.modelled_seconds
        print(
            f"{ours.case.kernel} {ours.case.arch} M={ours.case.shape['M']}: {ours.valu_per_weight:.2f} against "
            f"{theirs.valu_per_weight:.2f} vector instructions per weight ({valu:.1f} times), issue-bound time "
            f"{seconds:.1f} times (modelled)"
        )
        assert valu > 1.4 and seconds > 1.4


def test_the_gates_can_fail() -> None:
    """One warp that owns four rows of a long K has too many registers for eight rows of activations and eight waves,
    and a tile cut in two for sixteen lanes each costs too many instructions on a short K.
    """
    spilling = case("nl4_gemm", {"N": 4096, "K": 160}, 8, decode_config(8, 4, 1, 32, waves_per_eu=8), "gfx1201")
    costly = case("nl4_gemm", {"N": 4096, "K": 160}, 4, decode_config(4, 1, 2, 16), "gfx1201")
    few_waves = case("nl4_gemm", {"N": 4096, "K": 4096}, 8, decode_config(8, 8, 4, 32), "gfx1201")
    reports = inspect_cases([spilling, costly, few_waves])
    assert all(isinstance(report, Report) for report in reports)
    found = [" ".join(problems(report)) for report in reports if isinstance(report, Report)]
    assert "spilled" in found[0] and "vector instructions" in found[1] and "waves per SIMD" in found[2], found
