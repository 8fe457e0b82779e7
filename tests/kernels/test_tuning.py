"""Tuned configurations: both spellings of a GPU, the nearest rows and shape, one warning, folders."""

import itertools
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from step128_kernels.tuned import load as tuning
from step128_kernels.tuned.load import TuningFileError, load_config
from step128_kernels.tuned.names import file_name

R9700 = ("AMD_Radeon_R9700", "AMD_Radeon_AI_PRO_R9700")
STRIX = ("AMD_Radeon_8060S", "Radeon_8060S_Graphics")
GEMM = {"N": 2560, "K": 4096}
MOE = {"E": 240, "N": 320, "K": 4096, "top_k": 8}
DEFAULT = {1: {"phase": "decode", "BLOCK_N": 1}}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each test is a new process as far as the loader can see, with an empty shipped folder."""
    (tmp_path / "configs" / "tuned").mkdir(parents=True)
    monkeypatch.setenv("STEP128_CONFIGS_DIR", str(tmp_path / "configs"))
    monkeypatch.delenv("STEP128_TUNED_DIR", raising=False)
    forget()
    yield
    forget()


def forget() -> None:
    tuning._load.cache_clear()
    tuning.tuned_folders.cache_clear()
    tuning._warned.clear()


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    return tmp_path / "configs" / "tuned"


def document(kernel: str, shape: dict[str, int], device: str, arch: str, **changes: Any) -> dict[str, Any]:
    configs = {"1": {"phase": "decode", "BLOCK_N": 64}, "4": {"phase": "decode", "BLOCK_N": 32}}
    return {
        "schema": 1,
        "kernel": kernel,
        "shape": shape,
        "device": device,
        "arch": arch,
        "source": "measured",
        "method": "test",
        "date": "2026-01-01",
        "versions": {"torch": "2.13.0"},
        "driver": None,
        "configs": configs,
    } | changes


def put(
    folder: Path,
    kernel: str = "nl4_gemm",
    shape: dict[str, int] = GEMM,
    device: str = R9700[0],
    arch: str = "gfx1201",
    **changes: Any,
) -> Path:
    path = folder / file_name(kernel, shape, device)
    path.write_text(json.dumps(document(kernel, shape, device, arch, **changes)))
    return path


def marked(number: int) -> dict[str, Any]:
    """Configurations that can be told from others."""
    return {"1": {"phase": "decode", "BLOCK_N": number}}


@pytest.mark.parametrize(("arch", "names"), [("gfx1201", R9700), ("gfx1151", STRIX)])
@pytest.mark.parametrize(("in_file", "inside", "asked"), list(itertools.product((0, 1), repeat=3)))
def test_both_spellings_are_found_both_ways(
    shipped: Path, caplog: pytest.LogCaptureFixture, arch: str, names: Any, in_file: int, inside: int, asked: int
) -> None:
    path = shipped / file_name("nl4_moe", MOE, names[in_file])
    path.write_text(json.dumps(document("nl4_moe", MOE, names[inside], arch)))
    table = load_config("nl4_moe", MOE, names[asked].replace("_", " "), arch, default=DEFAULT)
    assert (table.path, table.exact, table.source) == (path, True, "measured")
    assert not caplog.records


@pytest.mark.parametrize(
    ("rows", "tuned"), [(1, 1), (2, 1), (3, 4), (6, 4), (7, 4), (8, 10), (41, 10), (42, 72), (10**6, 72)]
)
def test_nearest_rows_and_the_smaller_of_two(shipped: Path, rows: int, tuned: int) -> None:
    """Written out of order: neither the file's order nor text order ("10" < "4") may decide."""
    order = ("72", "4", "10", "1")
    put(shipped, configs={key: {"phase": "prefill", "BLOCK_M": int(key)} for key in order})
    table = load_config("nl4_gemm", GEMM, R9700[0], "gfx1201", default=DEFAULT)
    assert table.nearest(rows) == {"phase": "prefill", "BLOCK_M": tuned}


def test_two_equally_near_rows() -> None:
    table = tuning.TunedTable({16: {"BLOCK_M": 16}, 8: {"BLOCK_M": 8}}, "built in")
    assert table.nearest(12)["BLOCK_M"] == 8


def test_a_users_folder_comes_first(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv("STEP128_TUNED_DIR", str(own))
    put(shipped)
    path = put(own, device=R9700[1], configs=marked(7))
    table = load_config("nl4_gemm", GEMM, R9700[0], "gfx1201", default=DEFAULT)
    assert (table.path, table.nearest(1)["BLOCK_N"]) == (path, 7)


def test_files_are_read_once(shipped: Path) -> None:
    path = put(shipped)
    first = load_config("nl4_gemm", GEMM, R9700[0], "gfx1201", default=DEFAULT)
    path.unlink()
    assert load_config("nl4_gemm", GEMM, R9700[0], "gfx1201", default=DEFAULT) == first


def test_without_a_file_the_nearest_shape_of_the_arch_serves_with_one_warning(
    shipped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(shipped, shape={"N": 11264, "K": 4096}, configs=marked(1))
    near = put(shipped, shape={"N": 4096, "K": 4096}, configs=marked(2))
    put(shipped, shape=GEMM, device=STRIX[0], arch="gfx1151", configs=marked(3))
    put(shipped, kernel="nl4_moe", shape=MOE, configs=marked(4))
    for name in (*R9700, *R9700):
        table = load_config("nl4_gemm", GEMM, name, "gfx1201", default=DEFAULT)
        assert (table.path, table.exact, table.nearest(1)["BLOCK_N"]) == (near, False, 2)
    [record] = caplog.records
    message = record.getMessage()
    assert record.levelno == logging.WARNING
    assert "N=2560,K=4096,device_name=AMD_Radeon_R9700,dtype=nl4.json" in message
    assert near.name in message
    assert "on AMD_Radeon_R9700:" in message
    assert message.endswith(": step128-kernels tune --kernel nl4_gemm --shape N=2560,K=4096 --arch gfx1201")


def test_same_shape_on_another_gpu_of_the_arch_is_nearest(shipped: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(shipped, shape={"N": 2561, "K": 4096}, device="AMD_Radeon_RX9070XT")
    path = put(shipped)
    assert load_config("nl4_gemm", GEMM, "AMD_Radeon_RX9070XT", "gfx1201", default=DEFAULT).path == path
    assert "device_name=AMD_Radeon_RX9070XT" in caplog.text


def test_each_missing_file_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    for shape in (GEMM, {"N": 4096, "K": 1280}, GEMM):
        table = load_config("nl4_gemm", shape, R9700[0], "gfx1201", default=DEFAULT)
        assert (table.source, table.configs) == ("built in", DEFAULT)
    assert len(caplog.records) == 2
    assert "the built-in default" in caplog.text


def test_a_name_that_hides_another_shape_is_not_taken_for_ours(shipped: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The name of an experts' file leaves out K."""
    put(shipped, kernel="nl4_moe", shape=MOE | {"K": 2048})
    assert not load_config("nl4_moe", MOE, R9700[0], "gfx1201", default=DEFAULT).exact
    assert len(caplog.records) == 1


@pytest.mark.parametrize("arch", ["sm_90", "gfx1100", ""])
def test_other_gpus_get_the_default_in_silence(shipped: Path, caplog: pytest.LogCaptureFixture, arch: str) -> None:
    put(shipped)
    table = load_config("nl4_gemm", GEMM, "NVIDIA_H200", arch, default=DEFAULT)
    assert (table.configs, table.source) == (DEFAULT, "built in")
    assert not caplog.records


@pytest.mark.parametrize("variable", ["STEP128_TUNED_DIR", "STEP128_CONFIGS_DIR"])
def test_a_variable_that_names_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "absent"))
    with pytest.raises(TuningFileError, match=rf"{variable}.*absent.*not a folder"):
        load_config("nl4_gemm", GEMM, R9700[0], "gfx1201", default=DEFAULT)


def test_without_any_folder_the_default_serves(shipped: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(shipped)
    assert load_config("nl4_gemm", GEMM, R9700[0], "gfx1201", default=DEFAULT).source == "built in"
    assert "no folder" in caplog.text


def test_a_broken_neighbour_is_named_and_a_stranger_is_ignored(shipped: Path) -> None:
    (shipped / "E=240,N=320,device_name=AMD_Radeon_R9700.json").write_text("vLLM's own")
    (shipped / "README.md").write_text("")
    assert load_config("nl4_gemm", GEMM, R9700[0], "gfx1201", default=DEFAULT).source == "built in"
    forget()
    path = put(shipped, shape={"N": 1, "K": 16}, source="guessed")
    with pytest.raises(TuningFileError, match="source") as failure:
        load_config("nl4_gemm", GEMM, R9700[0], "gfx1201", default=DEFAULT)
    assert str(path) in str(failure.value)


KEYS = {"decode": frozenset({"BLOCK_N"}), "prefill": frozenset({"BLOCK_M", "BLOCK_N"})}


@pytest.mark.parametrize("shape", [GEMM, {"N": 4096, "K": 4096}], ids=["exact", "nearest"])
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"phase": "decode", "BLOK_N": 1}, r"configs\.4\.BLOK_N is not a key .*decode .*BLOCK_N, phase"),
        ({"phase": "decode", "BLOCK_N": 1, "BLOCK_M": 1}, r"configs\.4\.BLOCK_M is not a key"),
        ({"phase": "prefill", "BLOCK_N": 1}, r"configs\.4\.BLOCK_M is missing; a prefill"),
    ],
)
def test_keys_are_those_that_the_kernel_reads(
    shipped: Path, config: dict[str, Any], words: str, shape: dict[str, int]
) -> None:
    path = put(shipped, shape=shape, configs=marked(1) | {"4": config})
    with pytest.raises(TuningFileError, match=words) as failure:
        load_config("nl4_gemm", GEMM, R9700[0], "gfx1201", default=DEFAULT, keys=KEYS)
    assert str(path) in str(failure.value)
    assert load_config("nl4_gemm", GEMM, R9700[0], "gfx1201", default=DEFAULT).path == path  # unchecked
    with pytest.raises(TuningFileError, match="'decode', and nl4_gemm has only prefill"):
        load_config("nl4_gemm", GEMM, R9700[0], "gfx1201", default=DEFAULT, keys={"prefill": frozenset({"BLOCK_M"})})


def test_right_keys_are_taken(shipped: Path) -> None:
    path = put(shipped, configs=marked(1) | {"16": {"phase": "prefill", "BLOCK_M": 1, "BLOCK_N": 1}})
    assert load_config("nl4_gemm", GEMM, R9700[0], "gfx1201", default=DEFAULT, keys=KEYS).path == path


def test_a_file_of_another_arch_is_refused(shipped: Path) -> None:
    path = put(shipped, arch="gfx1151")
    with pytest.raises(TuningFileError, match=r"arch is 'gfx1151'.*'gfx1201'") as failure:
        load_config("nl4_gemm", GEMM, R9700[0], "gfx1201", default=DEFAULT)
    assert str(path) in str(failure.value)
