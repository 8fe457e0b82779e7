"""vLLM's own expert kernel: our launches are those of its host code, and it reads the files that we write."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from step128_kernels.tune.files import Provenance, tune
from step128_kernels.tune.journal import Outcome
from step128_kernels.tune.search import Candidate, Target, candidates_of
from step128_kernels.tuned.names import file_name
from step128_kernels.tuned.schema import MODELLED
from step128_kernels.vllm_plugin import fused_moe_tuning
from step128_kernels.vllm_plugin.fused_moe_launch import Call

KERNEL = "vllm_fused_moe"
SHAPE = {"E": 240, "N": 320, "K": 4096, "top_k": 8}
TARGET = Target(KERNEL, SHAPE, "AMD_Radeon_R9700", "gfx1201")


def first_is_fastest(candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Outcome]]:
    for candidate in candidates:
        yield candidate, Outcome(seconds=float(candidate.config["BLOCK_SIZE_N"]))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM does and reads, from a process in which its Triton kernels are there."""
    pytest.importorskip("vllm")
    output = tmp_path_factory.mktemp("tuned")
    provenance = Provenance(MODELLED, "test", "2026-01-01", {"triton": "3.9.0"}, None, "0")
    with Progress(disable=True) as bar:
        tune((TARGET,), lambda kernel: fused_moe_tuning, first_is_fastest, provenance, output, False, bar)
    script = Path(__file__).with_name("vllm_fused_moe_launches.py")
    process = subprocess.run(
        [sys.executable, str(script), str(output / "vllm")],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        check=False,
    )
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def test_our_launches_are_those_of_vllms_host_code(found: dict[str, Any]) -> None:
    assert len(found["said"]) == 6
    for said, done in zip(found["said"], found["done"], strict=True):
        assert said == done
    assert found["naive"] == [True]


def test_vllm_finds_and_reads_our_file(found: dict[str, Any]) -> None:
    assert found["name"] == file_name(KERNEL, SHAPE, "AMD_Radeon_R9700")
    assert [int(rows) for rows in found["read"]] == [2**power for power in range(13)]
    assert found["other"] is None
    for config in found["read"].values():
        assert set(config) == {
            *("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "SPLIT_K", "num_warps", "num_stages")
        }


def test_the_first_candidate_is_vllms_default(found: dict[str, Any]) -> None:
    assert found["default"] == [default | {"phase": "decode"} for default in found["default of vLLM"]]
    by_rows = {one.rows: one.config for one in reversed(candidates_of(fused_moe_tuning, TARGET))}
    assert [by_rows[2**power] | {"phase": "decode"} for power in range(13)] == found["default"]


def test_a_memory_bound_tie_keeps_vllms_default(found: dict[str, Any]) -> None:
    """The default is offered first, and of equal figures the first is chosen; waiting would tell the tiles apart."""
    shape_bytes = 8 * 3 * 320 * 4096 * 2  # eight experts of three bfloat16 matrices
    assert found["ranked"] == [pytest.approx(shape_bytes / 640e9)] * 4
    assert len(set(found["ranked"])) == 1
    assert len(set(found["with waiting"])) > 1


def test_pairs_are_sorted_by_expert_and_padded() -> None:
    call = Call(rows=5, top_k=2, experts=3, hidden=16, intermediate=16)
    ids = call.sorted_pairs(4)
    assert ids[:12] == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 10]
    assert set(ids[12:]) == {10}
    assert len(ids) == 10 + 3 * 3
    assert call.padded_pairs(4) == 12
    assert call.block_experts(4) == [0, 1, 2, -1, -1]


def test_every_number_of_rows_has_candidates_of_one_phase() -> None:
    by_rows: dict[int, set[str]] = {}
    for candidate in candidates_of(fused_moe_tuning, TARGET):
        by_rows.setdefault(candidate.rows, set()).add(candidate.config["phase"])
    assert by_rows == {2**power: {"decode" if power < 3 else "prefill"} for power in range(13)}
