"""A sweep that was killed, interrupted or damaged goes on to the same files."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from step128_checkpoint.calibration.options import CalibrationOptions
from step128_checkpoint.calibration.plan import make_plan
from step128_checkpoint.calibration.result import open_calibration
from step128_checkpoint.calibration.states import StateWriter
from step128_checkpoint.calibration.sweep import CalibrationSummary, calibrate
from step128_checkpoint.errors import AlreadyCompleteError, ConfigurationError, OutputError

KEEP = 11

# A run that kills itself, without warning, after a number of tokens.
KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from step128_checkpoint.calibration.options import CalibrationOptions
from step128_checkpoint.calibration.states import StateWriter
from step128_checkpoint.calibration.sweep import calibrate
def count(name, done, total):
    if done >= int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint, samples, out = map(Path, sys.argv[1:4])
calibrate(CalibrationOptions(checkpoint, samples, out, keep=11, hessians=True, device="cpu", batch_tokens=300), count)
"""


pytestmark = pytest.mark.usefixtures("one_thread")


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file's bytes; of calibration.json all but the time that it took."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    document = json.loads(found["calibration.json"])
    assert document.pop("seconds") >= 0
    return found | {"calibration.json": json.dumps(document).encode()}


@pytest.fixture(scope="module")
def pruned(tiny: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CalibrationSummary]:
    """A calibration that prunes, never interrupted."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("pruned") / "cal"
    options = CalibrationOptions(tiny, samples, out, keep=KEEP, hessians=True, device="cpu", batch_tokens=300)
    return out, calibrate(options)


def killed_at(tiny: Path, samples: Path, out: Path, tokens: int) -> None:
    arguments = [sys.executable, "-c", KILLED_RUN, str(tiny), str(samples), str(out), str(tokens)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not out.exists()


def check_resumes(tiny: Path, samples: Path, pruned: Path, out: Path, kills: int, seed: int) -> list[int]:
    """Kill runs at random points, one after the other, then finish; returns the stages kept at the end."""
    options = CalibrationOptions(tiny, samples, out, keep=KEEP, hessians=True, device="cpu", batch_tokens=300)
    total = make_plan(options).total_tokens
    chooser, kept = random.Random(seed), []
    for _ in range(kills):
        killed_at(tiny, samples, out, chooser.randrange(1, total // kills))
        kept.append(len((out.with_name("cal.partial") / "journal.jsonl").read_text().splitlines()) - 1)
    summary = calibrate(options)
    assert summary.verified_stages == kept[-1] and summary.damaged is None
    assert files_of(out) == files_of(pruned)
    assert not out.with_name("cal.partial").exists()
    return kept


def test_a_killed_sweep_resumes_to_the_same_files(
    tiny: Path, samples: Path, pruned: tuple[Path, CalibrationSummary], tmp_path: Path
) -> None:
    kept = check_resumes(tiny, samples, pruned[0], tmp_path / "cal", kills=1, seed=1)
    assert kept[-1] > 0


@pytest.mark.proof
@pytest.mark.parametrize("seed", range(4))
def test_a_sweep_killed_many_times_resumes_to_the_same_files(
    tiny: Path, samples: Path, pruned: tuple[Path, CalibrationSummary], tmp_path: Path, seed: int
) -> None:
    check_resumes(tiny, samples, pruned[0], tmp_path / "cal", kills=5, seed=10 + seed)


def interrupt(options: CalibrationOptions, stage: str) -> Path:
    """Run until a stage has begun; returns the work folder."""

    def stop(name: str, done: int, total: int) -> None:
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(options, stop)
    return options.out.with_name("cal.partial")


def test_a_finished_stage_is_on_disk_before_the_next_begins(
    options: CalibrationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut takes away what is not synced: of a stage, neither its files' data, nor their names, nor its note."""
    work, fsync = options.out.with_name("cal.partial"), os.fsync
    synced: list[str] = []

    def watch(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append(str(path.relative_to(work.parent)))
        if path.name == "journal.jsonl" and len(stages := path.read_text().splitlines()) > 2:
            assert json.loads(stages[-1])["tensor"] == f"layer {len(stages) - 3}"
            files = ["stages/layer-{}.safetensors.unfinished", "stages", f"states-{(len(stages) - 2) % 2}", "."]
            files += ["checkpoint", "checkpoint/hessians", "checkpoint/hessians/layer-{:05d}.safetensors.unfinished"]
            expected = {str(Path("cal.partial", name.format(len(stages) - 3))) for name in files}
            assert expected <= set(synced)
            synced.clear()
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", watch)
    interrupt(replace(options, hessians=True), "layer 2")
    lines = (work / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["tensor"] for line in lines[1:]] == ["embeddings", "layer 0", "layer 1"]
    assert not synced, "every note is synced, and last"


@pytest.mark.parametrize("damaged", ["states-1", "stages/layer-1.safetensors"])
def test_what_was_damaged_meanwhile_is_noticed(options: CalibrationOptions, damaged: str) -> None:
    work = interrupt(options, "layer 3")  # states-1 has what layer 2 wrote
    with (work / damaged).open("r+b") as stream:
        stream.seek(100)
        stream.write(b"\xff")
    summary = calibrate(options)
    assert (summary.verified_stages, summary.damaged) == (0, Path(damaged).name)
    whole = replace(options, out=options.out.with_name("whole"))
    calibrate(whole)
    assert files_of(options.out) == files_of(whole.out)


def test_killed_before_the_rename_only_the_rename_is_left(
    options: CalibrationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def interrupted(source: Path, target: Path) -> None:
        if Path(source).name == "checkpoint":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(options)
    assert not options.out.exists()
    assert sorted(path.name for path in options.out.with_name("cal.partial").iterdir()) == [
        "checkpoint",
        "journal.jsonl",
    ]
    summary = calibrate(options)
    assert summary.verified_stages == summary.stages and summary.tokens == 0
    assert open_calibration(options.out).document["pruned"] is None


def test_killed_after_the_rename_nothing_is_left_to_do(
    options: CalibrationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("step128_checkpoint.calibration.sweep.remove_work", killed)
        with pytest.raises(KeyboardInterrupt):
            calibrate(options)
    with pytest.raises(AlreadyCompleteError, match="cal is complete: the earlier `calibrate`"):
        calibrate(options)
    assert not options.out.with_name("cal.partial").exists()
    assert open_calibration(options.out).document["pruned"] is None


def test_another_run_is_not_continued_but_may_be_restarted(options: CalibrationOptions) -> None:
    interrupt(options, "layer 2")
    with pytest.raises(OutputError, match=r"differs from this one in dtype .*--restart"):
        calibrate(replace(options, dtype="float32"))
    summary = calibrate(replace(options, dtype="float32", restart=True))
    assert summary.verified_stages == 0 and open_calibration(options.out).document["dtype"] == "float32"
    with pytest.raises(OutputError, match="exists already"):
        calibrate(options)


def test_a_smaller_batch_continues_a_run(options: CalibrationOptions) -> None:
    interrupt(options, "layer 2")
    assert calibrate(replace(options, batch_tokens=150)).verified_stages == 3


def test_a_full_disk_is_explained_and_the_run_goes_on(
    options: CalibrationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(options, "layer 1")
    with monkeypatch.context() as patch:
        patch.setattr(StateWriter, "_write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OutputError, match="the disk is full"):
            calibrate(options)
    assert calibrate(options).verified_stages == 2


def test_memory_that_runs_out_on_the_way_is_explained(
    options: CalibrationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(options, "layer 1")
    with monkeypatch.context() as patch:
        patch.setattr(
            "step128_checkpoint.calibration.stages.run_layer",
            lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
        )
        with pytest.raises(ConfigurationError, match="layer 1: cpu has not enough memory for 300 tokens"):
            calibrate(options)
    assert calibrate(options).verified_stages == 2
