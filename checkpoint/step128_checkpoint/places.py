"""Which folders a conversion may write to: never one that it did not make, and none that overlaps its input.

While it runs, everything is in ``OUT.partial/``: the journal, and ``checkpoint/``, which becomes ``OUT`` by a rename.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from step128_checkpoint.calibration.result import CALIBRATION_NAME
from step128_checkpoint.errors import AlreadyCompleteError, OutputError
from step128_checkpoint.journal import JOURNAL_NAME, fingerprint_of, is_journal
from step128_checkpoint.manifest import MANIFEST_NAME


def work_folder(out: Path) -> Path:
    """``OUT.partial`` beside the output."""
    return out.with_name(out.name + ".partial")


def check_places(source: Path, out: Path) -> Path:
    """Refuse places whose content would be lost; returns the output with symbolic links resolved.

    Raises:
        AlreadyCompleteError: the run that made the output was killed between its rename and its clean-up, which is done
            now. That its options were the same is not checked: the message names its command.
        OutputError: the output exists (an empty folder may), it or ``OUT.partial`` overlaps the input, it lies in a
            finished checkpoint, or ``OUT.partial`` was not made by a conversion.
    """
    try:
        source, out = source.resolve(), out.resolve()
    except RuntimeError as error:  # a loop of symbolic links, before Python 3.13
        raise OutputError(str(error)) from None
    work = work_folder(out)
    for place in (out, work, work.resolve()):
        if place.is_relative_to(source):
            raise OutputError(f"{place} lies inside the input folder. Choose another place for the output.")
        if source.is_relative_to(place):
            raise OutputError(
                f"the input folder {source} lies inside {place}, which the run replaces. Move one of them."
            )
    for folder in out.parents:
        if _is_checkpoint(folder):
            raise OutputError(f"{out} lies inside the checkpoint {folder}. Choose another place for the output.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        _finish_killed_run(out, work)
        raise OutputError(f"{out} exists already. Choose another output folder, or delete this one.")
    if (work.exists() or work.is_symlink()) and not _is_ours(work):
        raise OutputError(
            f"{work} is needed for unfinished work, but something else is there (no {JOURNAL_NAME} of a conversion). "
            "Move it away, or choose another output folder."
        )
    return out


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _finish_killed_run(out: Path, work: Path) -> None:
    """Clean up after a run that was killed when the output had its name: only the journal is left of its work."""
    fingerprint = fingerprint_of(work / JOURNAL_NAME)
    if fingerprint is None or [path.name for path in work.iterdir()] != [JOURNAL_NAME]:
        return
    if not any((out / name).is_file() for name in (MANIFEST_NAME, CALIBRATION_NAME)):
        return  # no product of ours: it came while the run was interrupted
    remove_work(work)
    raise AlreadyCompleteError(
        f"{out} is complete: the earlier `{fingerprint['command']}` was killed just after it finished. To make it "
        "again, delete it first."
    )


def _is_ours(work: Path) -> bool:
    """Whether an interrupted conversion left this folder: with its journal, or killed before it wrote one."""
    if work.is_symlink() or not work.is_dir():
        return False
    journal, names = work / JOURNAL_NAME, [path.name for path in work.iterdir()]
    return not names or is_journal(journal) or (names == [JOURNAL_NAME] and journal.stat().st_size == 0)


@contextmanager
def made_folders(work: Path) -> Iterator[None]:
    """Make a folder and its parents; after a failure, those of them that hold nothing are removed again."""
    made = [folder for folder in (work, *work.parents) if not folder.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # it holds work that a later run continues, or it never came to be
                folder.rmdir()
        raise


def remove_work(work: Path) -> None:
    """Remove the journal, and the work folder if that was all in it."""
    (work / JOURNAL_NAME).unlink(missing_ok=True)
    if not any(work.iterdir()):
        work.rmdir()
