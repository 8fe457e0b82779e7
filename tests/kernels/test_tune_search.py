"""The search: what is finished is never done again, files appear whole, equal outcomes give equal files."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from step128_kernels.tune import journal as tune_journal
from step128_kernels.tune.files import Provenance, tune
from step128_kernels.tune.journal import Journal, Outcome, OutputError, write_json
from step128_kernels.tune.search import Candidate, Shape, Target, candidates_of
from step128_kernels.tuned.schema import MEASURED, MODELLED, Config, read_file

GEMM = Target("nl4_gemm", {"N": 64, "K": 128}, "AMD_Radeon_R9700", "gfx1201")
MOE = Target("nl4_moe", {"E": 8, "N": 32, "K": 128, "top_k": 2}, "AMD_Radeon_R9700", "gfx1201")
VLLM = Target("vllm_fused_moe", {"E": 8, "N": 32, "K": 128, "top_k": 2}, "AMD_Radeon_R9700", "gfx1201")


class Space:
    """Two configurations for decode at 1 and 8 rows, two for prefill from 8 to 16."""

    SHAPES: Mapping[str, Sequence[Shape]] = {"nl4_gemm": (GEMM.shape,), "nl4_moe": (MOE.shape,)}

    def candidates(self, kernel: str, phase: str, shape: Shape, m: int, arch: str) -> Iterable[Config]:
        rows = {"decode": (1, 8), "prefill": (8, 16)}[phase]
        return [{"phase": phase, "BLOCK_N": block} for block in (16, 32, 32)] if m in rows else []

    def case(self, kernel: str, shape: Shape, m: int, config: Config, arch: str) -> Any:
        raise AssertionError

    def runner(self, kernel: str, shape: Shape, m: int, config: Config) -> Any:
        raise AssertionError


SECONDS = {  # by rows, phase and BLOCK_N; None: it may not serve
    (1, "decode", 16): 3.0,
    (1, "decode", 32): 2.0,
    (8, "decode", 16): 4.0,
    (8, "decode", 32): None,
    (8, "prefill", 16): 5.0,
    (8, "prefill", 32): 4.0,
    (16, "prefill", 16): 7.0,
    (16, "prefill", 32): 7.0,
}
CHOSEN = {
    "1": {"phase": "decode", "BLOCK_N": 32},
    "8": {"phase": "decode", "BLOCK_N": 16},
    "16": {"phase": "prefill", "BLOCK_N": 16},
}


class Judging:
    """A judge that counts its work, and stops where a test says."""

    def __init__(self, stop_after: int | None = None, order: Callable[[list[Any]], Iterable[Any]] = list) -> None:
        self.calls: Counter[str] = Counter()
        self.stop_after = stop_after
        self.order = order

    def __call__(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Outcome]]:
        for candidate in self.order(list(candidates)):
            if self.calls.total() == self.stop_after:
                raise KeyboardInterrupt
            self.calls[f"{candidate.target} {candidate.key}"] += 1
            seconds = SECONDS[candidate.rows, candidate.config["phase"], candidate.config["BLOCK_N"]]
            yield candidate, Outcome(seconds, "spills registers" if seconds is None else None)


def provenance(**changes: Any) -> Provenance:
    values: dict[str, Any] = {
        "source": MODELLED,
        "method": "test",
        "date": "2026-01-01",
        "versions": {"triton": "3.9.0"},
        "driver": None,
        "code": "0",
    }
    return Provenance(**values | changes)


def run(output: Path, judge: Any, targets: Sequence[Target] = (GEMM,), restart: bool = False, **changes: Any) -> Any:
    with Progress(disable=True) as bar:
        return tune(targets, lambda kernel: Space(), judge, provenance(**changes), output, restart, bar)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_fastest_that_serves_is_written(tmp_path: Path) -> None:
    """At 8 rows decode and prefill tie, at 16 both blocks do: the ones offered first."""
    judge = Judging()
    result = run(tmp_path, judge)
    path = tmp_path / "N=64,K=128,device_name=AMD_Radeon_R9700,dtype=nl4.json"
    assert result.written == [str(path)]
    document = json.loads(path.read_text())
    assert document["configs"] == CHOSEN
    assert (document["source"], document["driver"], document["date"]) == (MODELLED, None, "2026-01-01")
    assert {str(rows): dict(config) for rows, config in read_file("nl4_gemm", path).configs.items()} == CHOSEN
    assert set(judge.calls.values()) == {1}  # a candidate given twice is judged once
    assert len(judge.calls) == len(SECONDS)
    assert list(contents(tmp_path)) == [path.name]  # no journal is left


@pytest.mark.parametrize("order", [sorted, reversed], ids=["sorted", "reversed"])
def test_the_order_of_outcomes_changes_nothing(tmp_path: Path, order: Any) -> None:
    in_order = (lambda found: sorted(found, key=lambda one: one.key)) if order is sorted else reversed
    run(tmp_path / "one", Judging(), (GEMM, MOE))
    run(tmp_path / "other", Judging(order=in_order), (GEMM, MOE))
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_equal_configurations_are_judged_side_by_side(tmp_path: Path) -> None:
    seen: list[Candidate] = []

    def keep(candidates: list[Candidate]) -> list[Candidate]:
        seen.extend(candidates)
        return candidates

    run(tmp_path, Judging(order=keep))
    blocks = [(one.config["phase"], one.config["BLOCK_N"]) for one in seen]
    assert blocks == sorted(blocks, key=lambda block: (block[1], block[0]))
    assert len(seen) == len(candidates_of(Space(), GEMM)) == len(SECONDS)


@pytest.mark.parametrize("stop_after", range(2 * len(SECONDS)))
def test_what_was_finished_is_not_done_again(tmp_path: Path, stop_after: int) -> None:
    run(tmp_path / "whole", Judging(), (GEMM, MOE))
    judge = Judging(stop_after)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", judge, (GEMM, MOE))
    rest = Judging()
    run(tmp_path / "cut", rest, (GEMM, MOE))
    assert set((judge.calls + rest.calls).values()) == {1}
    assert (judge.calls + rest.calls).total() == 2 * len(SECONDS)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_torn_line_costs_one_candidate(tmp_path: Path) -> None:
    judge = Judging(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, judge)
    [journal] = tmp_path.glob("*.journal")
    journal.write_bytes(journal.read_bytes()[:-5])
    second, rest = Judging(stop_after=2), Judging()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, second)
    run(tmp_path, rest)
    assert rest.calls.total() == len(SECONDS) - 2 - 2
    assert len(judge.calls + second.calls + rest.calls) == len(SECONDS)


def test_work_under_other_conditions_is_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Judging(stop_after=3))
    before = contents(tmp_path)
    for changes in ({"code": "1"}, {"versions": {"triton": "4"}}, {"source": MEASURED}, {"driver": "amdgpu 6"}):
        with pytest.raises(OutputError, match=rf"another {next(iter(changes))}.*--restart"):
            run(tmp_path, Judging(), **changes)
    assert contents(tmp_path) == before
    tomorrow = Judging()
    run(tmp_path, tomorrow, date="2026-01-02")
    assert tomorrow.calls.total() == len(SECONDS) - 3


def test_restart_forgets(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Judging(stop_after=3))
    judge = Judging()
    run(tmp_path, judge, restart=True, code="1")
    assert judge.calls.total() == len(SECONDS)


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    output = GEMM.path(tmp_path)
    journal = Journal(output, {}, restart=False)
    with pytest.raises(OutputError, match="another run"):
        run(tmp_path, Judging())
    journal.close()


def test_a_target_of_which_nothing_serves_is_told_and_stops_no_other(tmp_path: Path) -> None:
    def judge(candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Outcome]]:
        for candidate, outcome in Judging()(candidates):
            spilled = candidate.target is GEMM and candidate.rows == 16
            yield candidate, Outcome(problem="spills registers") if spilled else outcome

    result = run(tmp_path, judge, (GEMM, MOE))
    assert result.written == [str(MOE.path(tmp_path))]
    [problem] = result.failed
    assert "nl4_gemm N=64,K=128 on AMD_Radeon_R9700" in problem
    assert "at 16 rows: spills registers (2 of 2)" in problem
    assert not GEMM.path(tmp_path).exists()


def missing(gates: Mapping[tuple[int, int], str], stop_after: int | None = None) -> Any:
    """A judge that says of some rows and BLOCK_N which gate they miss."""

    def judge(candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Outcome]]:
        for candidate, outcome in Judging(stop_after)(candidates):
            gate = gates.get((candidate.rows, candidate.config["BLOCK_N"]))
            yield candidate, outcome if outcome.seconds is None else replace(outcome, missed=gate)

    return judge


def test_who_misses_a_gate_serves_only_where_all_do(tmp_path: Path) -> None:
    """At 1 row the slower one meets the gates; at 16 none does, and the faster of them is taken, though given last."""
    gates = {(1, 32): "few waves", (8, 16): "narrow", (16, 16): "few waves", (16, 32): "few waves"}
    result = run(tmp_path / "whole", missing(gates))
    assert result.written == [str(GEMM.path(tmp_path / "whole"))]
    configs = json.loads(GEMM.path(tmp_path / "whole").read_text())["configs"]
    assert {rows: (one["phase"], one["BLOCK_N"]) for rows, one in configs.items()} == {
        "1": ("decode", 16),
        "8": ("prefill", 32),
        "16": ("prefill", 16),
    }
    assert result.warned == [
        "nl4_gemm N=64,K=128 on AMD_Radeon_R9700: at 16 rows no candidate meets all gates; the fastest serves, with: "
        "few waves."
    ]
    for stop_after in range(1, len(SECONDS)):  # an interrupted run remembers the gates too
        output = tmp_path / str(stop_after)
        with pytest.raises(KeyboardInterrupt):
            run(output, missing(gates, stop_after))
        assert run(output, missing(gates)).warned == result.warned
        assert contents(output) == contents(tmp_path / "whole")


def test_rows_that_miss_the_same_gate_are_told_together(tmp_path: Path) -> None:
    gates = {(rows, block): "narrow" if rows == 8 else "few waves" for rows in (1, 8, 16) for block in (16, 32)}
    warned = run(tmp_path, missing(gates)).warned
    assert [warning.partition(": at ")[2] for warning in warned] == [
        "1, 16 rows no candidate meets all gates; the fastest serves, with: few waves.",
        "8 rows no candidate meets all gates; the fastest serves, with: narrow.",
    ]


def test_a_model_never_replaces_measurements(tmp_path: Path) -> None:
    for target in (GEMM, VLLM):
        run(tmp_path, Judging(), (target,), source=MEASURED)
    before, judge = contents(tmp_path), Judging()
    result = run(tmp_path, judge, (GEMM, VLLM))
    assert result.kept == [str(GEMM.path(tmp_path)), str(VLLM.path(tmp_path))]
    assert (judge.calls.total(), contents(tmp_path)) == (0, before)
    run(tmp_path, judge, (GEMM,), source=MEASURED, date="2026-02-02")
    assert json.loads(GEMM.path(tmp_path).read_text())["date"] == "2026-02-02"


def test_vllms_own_files_hold_nothing_that_breaks_its_reader(tmp_path: Path) -> None:
    run(tmp_path, Judging(), (VLLM,))
    folder = tmp_path / "vllm"
    name = "E=8,N=32,device_name=AMD_Radeon_R9700"
    document = json.loads((folder / f"{name}.json").read_text())
    assert document.pop("triton_version") == "3.9.0"
    assert {int(rows): config for rows, config in document.items()} == {
        1: {"BLOCK_N": 32},
        8: {"BLOCK_N": 16},
        16: {"BLOCK_N": 16},
    }
    assert json.loads((folder / f"{name}.provenance.json").read_text())["source"] == MODELLED


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"first": 0})
    with path.open() as reader:
        write_json(path, {"old": 1})
        assert json.load(reader) == {"first": 0}  # whoever reads meanwhile reads the earlier file, whole

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tune_journal.os, "fsync", fail)
    with pytest.raises(OutputError, match=r"file\.json cannot be written: No space left.*--output") as failure:
        write_json(path, {"new": 2})
    assert failure.value.exit_code == 73
    assert contents(tmp_path) == {"file.json": b'{\n "old": 1\n}\n'}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_closed_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot be written") as failure:
        run(tmp_path / "closed", Judging())
    assert failure.value.exit_code == 5
