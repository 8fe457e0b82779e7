"""Specialization, and ``step128-kernels inspect`` as a person and a program meet it."""

import dataclasses
import json
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from offline_kernels import by_memory, case, counted_loop, launch, softmax
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from step128_kernels.cli import main
from step128_kernels.errors import CompilationError, NoSuchKernelError, ToolEnvironmentError
from step128_kernels.launch import KernelCase
from step128_kernels.offline.command import _weight_loads, select_cases
from step128_kernels.offline.compile import compile_key, compile_launch, specialize
from step128_kernels.offline.inspect import Report
from step128_kernels.offline.parallel import inspect_cases


@pytest.mark.parametrize(
    ("n", "kind", "attributes"), [(1, "constexpr", []), (48, "i32", [["tt.divisibility", 16]]), (49, "i32", [])]
)
def test_integers_are_specialized_as_when_launched(n: int, kind: str, attributes: list[list[Any]]) -> None:
    found = specialize(launch(counted_loop, {"n": n}), "gfx1201")
    assert found.signature == {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": kind, "BLOCK": "constexpr"}
    assert found.attributes[(2,)] == attributes
    assert found.constants == ({(2,): 1} if n == 1 else {}) | {(3,): 128}


@pytest.mark.parametrize(("size_bytes", "short"), [((1 << 31) - 16, True), (1 << 31, False)])
def test_pointers_below_two_gibibytes_have_a_short_range(size_bytes: int, short: bool) -> None:
    found = specialize(launch(counted_loop, {"n": 5}, size_bytes=size_bytes), "gfx1151")
    assert found.attributes[(0,)] == [["tt.divisibility", 16]] + [["tt.pointer_range", 32]] * short


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int64, "i64"), (torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.uint8, "u8")]
)
def test_pointers_are_specialized_like_tensors(dtype: torch.dtype, name: str) -> None:
    backend = make_backend(GPUTarget("hip", "gfx1201", 32))
    kind, description = native_specialize_impl(type(backend), torch.zeros(64, dtype=dtype), False, True, True)
    found = specialize(launch(counted_loop, {"n": 5}, dtypes={"x_ptr": name}), "gfx1201")
    assert found.signature["x_ptr"] == kind
    assert found.attributes[(0,)] == type(backend).parse_attr(description)


def test_equal_code_has_equal_keys() -> None:
    def key(n: int, num_warps: int = 1, arch: str = "gfx1201") -> str:
        return compile_key(launch(counted_loop, {"n": n}, num_warps=num_warps), arch)

    assert key(16) == key(4096) != key(17)
    assert len({key(16), key(1), key(16, 2), key(16, 1, "gfx1151")}) == 4


def test_wrong_arguments_are_named() -> None:
    right = launch(counted_loop, {"n": 5})
    with pytest.raises(CompilationError, match=r"missing \['n'\], unknown \['m'\]"):
        compile_launch(dataclasses.replace(right, scalars={"m": 5}), "gfx1201")
    with pytest.raises(CompilationError, match="element type 'int4' is unknown"):
        compile_launch(launch(counted_loop, {"n": 5}, dtypes={"x_ptr": "int4"}), "gfx1201")
    with pytest.raises(CompilationError, match="counted_loop does not compile for gfx1201"):
        compile_launch(launch(counted_loop, {"n": 5}, {"BLOCK": 100}), "gfx1201")


def test_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ToolEnvironmentError, match="Unset it"):
        compile_launch(launch(counted_loop, {"n": 5}), "gfx1201")
    monkeypatch.delenv("TRITON_INTERPRET")
    interpreted = dataclasses.replace(launch(counted_loop, {"n": 5}), function=counted_loop.fn)
    with pytest.raises(ToolEnvironmentError, match="not a JITFunction"):
        compile_launch(interpreted, "gfx1201")


GOOD = [case(launch(softmax), arch=arch) for arch in ("gfx1151", "gfx1201")]
BAD = case(launch(by_memory), kernel="broken")


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make ``all_cases`` return these; it must not be asked for other kernels than the one wanted."""

    def ship(*cases: KernelCase) -> None:
        def all_cases(arch: str | None, kernel: str | None) -> Iterable[KernelCase]:
            return [one for one in cases if arch in (None, one.arch) and kernel in (None, one.kernel)]

        for name, kernels in (("cases", cases), ("attention.cases", ())):
            module = types.ModuleType(f"step128_kernels.{name}")
            module.all_cases = all_cases  # type: ignore[attr-defined]
            module.SHAPES = {one.kernel: () for one in kernels}  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return ship


def test_json_has_what_programs_read(shipped: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    shipped(*GOOD)
    assert main(["inspect", "--json", "--arch", "gfx1201"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    wanted = {
        "kernel": str,
        "phase": str,
        "arch": str,
        "config": dict,
        "shape": dict,
        "vgprs": int,
        "sgprs": int,
        "spills": int,
        "lds_bytes": int,
        "waves_per_simd": float,
        "valu_per_weight": float,
        "lane_inst_per_byte": float,
        "bound_bytes_per_second": float,
        "instruction_mix": dict,
        "load_bits": dict,
        "wmma_per_launch": int,
        "workgroups": int,
        "waves": int,
    }
    assert {key: type(found[key]) for key in wanted} == wanted
    assert found["arch"] == "gfx1201"
    assert "bound_bytes_per_second" in found["modelled"]
    assert "not measured" in found["source"]


def test_table_is_for_people(
    shipped: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # a narrow table has fewer columns
    shipped(*GOOD)
    assert main(["inspect"]) == 0
    printed = capsys.readouterr()
    assert "toy decode on gfx1201 (Radeon AI PRO R9700, 640 GB/s)" in printed.out
    assert "toy decode on gfx1151 (Radeon 8060S, 256 GB/s)" in printed.out
    assert "modelled, not measured" in printed.out
    assert "x b128" in printed.out


def test_a_kernel_that_cannot_be_counted_does_not_hide_the_others(
    shipped: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    shipped(GOOD[0], BAD, GOOD[1])
    assert main(["inspect", "--json"]) == 70
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == 2
    assert "broken decode gfx1201 M=1 [BLOCK=128]: by_memory: the end of the loop" in printed.err


def test_results_keep_their_places() -> None:
    told: list[int] = []
    results = inspect_cases([GOOD[0], BAD, GOOD[1], GOOD[0]], 2, told.append)
    assert [type(one).__name__ for one in results] == ["Report", "CountingError", "Report", "Report"]
    assert [one.case.arch for one in results if isinstance(one, Report)] == ["gfx1151", "gfx1201", "gfx1151"]
    assert results[0] == results[3] == inspect_cases([GOOD[0]], 1)[0]
    assert sum(told) == 4


def test_unknown_kernel(shipped: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    shipped(*GOOD)
    assert main(["inspect", "--kernel", "nope", "--json"]) == 66
    printed = capsys.readouterr()
    assert json.loads(printed.out)["exit_code"] == 66
    assert "--kernel nope: no such kernel; there are toy." in printed.err
    assert main(["inspect", "--kernel", "toy", "--phase", "prefill"]) == 66
    assert "no configuration of toy is for prefill" in capsys.readouterr().err


def test_only_the_wanted_kernel_is_loaded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The other kernel's tuned files are neither read nor missed."""
    asked: list[str | None] = []
    module = types.ModuleType("step128_kernels.cases")
    module.SHAPES = {"toy": (), "other": ()}  # type: ignore[attr-defined]
    module.all_cases = lambda arch, kernel: asked.append(kernel) or GOOD  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "step128_kernels.cases", module)
    assert select_cases(None, "toy", None) == GOOD
    assert asked == ["toy"]


@pytest.mark.parametrize("command", ["inspect", "tune"])
@pytest.mark.parametrize("jobs", ["x", "0", "-1", "1.5"])
def test_jobs_must_be_a_number(command: str, jobs: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, f"--jobs={jobs}"])
    assert ended.value.code == 2
    assert f"--jobs: '{jobs}' is no whole number above 0" in capsys.readouterr().err


def test_a_narrow_table_holds_what_matters(
    shipped: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piped output obeys COLUMNS; 80 are what a terminal has."""
    shipped(*GOOD)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect"]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 80
    [heading, *_] = [line for line in narrow.splitlines() if "VGPR" in line]
    assert [word.strip() for word in heading.strip("┃ ").split("┃")] == [
        *("M", "shape", "VGPR", "waves/SIMD", "VALU/weight", "of card*")
    ]
    assert "--json, or 160 columns (it is 80)" in narrow.replace("\n", " ")
    for columns in ("160", "", "wide"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["inspect"]) == 0
        assert "weight loads" in capsys.readouterr().out


@pytest.mark.parametrize(("known", "said"), [({"tiles_ptr": 64, "x_ptr": 128}, "tiles b64"), ({}, "tiles unknown")])
def test_our_weights_are_the_tiles_however_large_the_rest_is(known: dict[str, int], said: str) -> None:
    wide = launch(softmax)
    tiles = dataclasses.replace(wide.pointers["x_ptr"], size_bytes=16)
    own = dataclasses.replace(wide, pointers={**wide.pointers, "tiles_ptr": tiles})
    report = types.SimpleNamespace(case=case(own), load_bits=known)
    assert _weight_loads(report) == said  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["triton", "torch"])
def test_missing_package_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["inspect"]) == 78
    assert f"needs the package {missing}" in capsys.readouterr().err


def test_help_documents_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    assert "70 a kernel does not compile" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "--arch", "gfx900"])
    assert ended.value.code == 2


def test_attention_is_chosen_by_cache_and_query_tokens() -> None:
    some = select_cases("gfx1201", "attention", "decode", "fp8", 4)
    assert {one.kernel for one in some} == {"attention_fp8"} and {one.shape["q_len"] for one in some} == {4}
    assert {one.kernel for one in select_cases(None, None, None, "bf16")} == {"attention_bf16"}
    assert {one.kernel for one in select_cases(None, "attention", "prefill")} == {"attention_fp8", "attention_bf16"}
    with pytest.raises(NoSuchKernelError, match="of attention is for any phase and 3 query tokens"):
        select_cases(None, "attention", None, None, 3)
