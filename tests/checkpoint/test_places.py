"""Where a conversion may write: it loses nobody's files, and what fails at the start leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from step128_checkpoint import conversion
from step128_checkpoint.cli import main
from step128_checkpoint.errors import OutputError
from step128_checkpoint.policy import load_policy
from step128_checkpoint.quantize import plan_quantization
from step128_checkpoint.reader import open_checkpoint


def quantize(source: Path, out: Path, *options: str) -> int:
    return main(["quantize", "--method", "mse", str(source), str(out), *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_output_that_exists_is_left_alone(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    assert quantize(source, out) == 73
    assert contents(out) == {"mine": b"keep"}
    assert not (tmp_path / "out.partial").exists()


def test_disk_too_small_is_known_before_writing(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: usage)
    plan = plan_quantization(open_checkpoint(make_checkpoint()), load_policy())
    with pytest.raises(OutputError, match=r"kB are needed, 1\.00 kB are free"):
        conversion.convert(plan, tmp_path / "new" / "folder" / "out", 1, False, lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]


def test_failure_before_any_tensor_leaves_nothing(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    source = make_checkpoint()
    for name in ("pwrite", "fsync"):  # the shards' headers, the journal's first line
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full_disk)
            assert quantize(source, tmp_path / "new" / "out") == 73
        assert [path.name for path in tmp_path.iterdir()] == ["bf16"]


@pytest.mark.parametrize("journal", [None, "", '{"fingerprint": {}}\n', '{"note": "mine"}\n'])
@pytest.mark.parametrize("option", [(), ("--restart",)])
def test_work_folder_of_someone_else_is_left_alone(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    journal: str | None,
    option: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, work = make_checkpoint(), tmp_path / "out.partial"
    (work / "checkpoint").mkdir(parents=True)
    (work / "checkpoint" / "thesis.txt").write_text("years of work")
    if journal is not None:
        (work / "journal.jsonl").write_text(journal)
    before = contents(work)
    assert quantize(source, tmp_path / "out", *option) == 73
    assert "something else is there" in capsys.readouterr().err
    assert contents(work) == before
    assert not (tmp_path / "out").exists()


def test_foreign_journal_beside_an_output_is_left_alone(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, work = make_checkpoint(), tmp_path / "out.partial"
    for folder in (work, tmp_path / "out"):
        folder.mkdir()
        (folder / "journal.jsonl").write_text("dear diary\n")
    assert quantize(source, tmp_path / "out") == 73
    assert contents(work) == {"journal.jsonl": b"dear diary\n"}


def test_another_folder_beside_a_dead_run_is_not_its_output(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, work, out = make_checkpoint(), tmp_path / "out.partial", tmp_path / "out"
    work.mkdir()
    (work / "journal.jsonl").write_text('{"fingerprint": {"command": "quantize", "input": "0"}}\n')
    out.mkdir()
    (out / "mine").write_text("keep")
    assert quantize(source, out) == 73
    assert contents(out) == {"mine": b"keep"}
    (out / "calibration.json").write_text("{}")
    (work / "stages").mkdir()  # a sweep's finished work: whatever lies at OUT now, it is not this run's
    assert quantize(source, out) == 73
    assert (work / "journal.jsonl").exists()


def test_output_inside_another_checkpoint_is_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, other = make_checkpoint(), make_checkpoint("other")
    before = contents(other)
    assert quantize(source, other / "deep" / "nl4") == 73
    assert f"lies inside the checkpoint {other}" in capsys.readouterr().err
    assert contents(other) == before


@pytest.mark.parametrize(
    ("source_name", "out_name"),
    [("z.partial", "z"), ("y.partial/checkpoint", "y"), ("a", "a/nl4"), ("a", "a"), ("a.partial/deep/er", "a")],
)
@pytest.mark.parametrize("through_link", [False, True])
def test_input_and_output_must_not_overlap(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    source_name: str,
    out_name: str,
    through_link: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / source_name
    source.parent.mkdir(parents=True, exist_ok=True)
    make_checkpoint().rename(source)
    before = contents(tmp_path)
    given = source
    if through_link:
        given = tmp_path / "link"
        given.symlink_to(source)
    assert quantize(given, tmp_path / out_name, "--restart") == 73
    assert "input folder" in capsys.readouterr().err
    if through_link:
        given.unlink()
    assert contents(tmp_path) == before
