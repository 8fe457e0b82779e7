"""Which folders a conversion may write to: never one that it did not make, and none that overlaps its input.

While it runs, everything is in ``OUT.partial/``: the journal, and ``checkpoint/``, which becomes ``OUT`` by a rename.
"""

from __future__ import annotations

from pathlib import Path

from step128_checkpoint.errors import OutputError
from step128_checkpoint.journal import JOURNAL_NAME, is_journal


def work_folder(out: Path) -> Path:
    """``OUT.partial`` beside the output."""
    return out.with_name(out.name + ".partial")


def check_places(source: Path, out: Path) -> Path:
    """Refuse places whose content would be lost; returns the output with symbolic links resolved.

    Raises:
        OutputError: the output exists (an empty folder may), it or ``OUT.partial`` overlaps the input, or
            ``OUT.partial`` was not made by a conversion.
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
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if is_journal(work / JOURNAL_NAME) and not (work / "checkpoint").exists():
            remove_work(work)  # killed between the rename and the clean-up: the output is complete
        raise OutputError(f"{out} exists already. Choose another output folder, or delete this one.")
    if (work.exists() or work.is_symlink()) and not _is_ours(work):
        raise OutputError(
            f"{work} is needed for unfinished work, but something else is there (no {JOURNAL_NAME} of a conversion). "
            "Move it away, or choose another output folder."
        )
    return out


def _is_ours(work: Path) -> bool:
    """Whether an interrupted conversion left this folder: with its journal, or killed before it wrote one."""
    if work.is_symlink() or not work.is_dir():
        return False
    journal, names = work / JOURNAL_NAME, [path.name for path in work.iterdir()]
    return not names or is_journal(journal) or (names == [JOURNAL_NAME] and journal.stat().st_size == 0)


def remove_work(work: Path) -> None:
    """Remove the journal, and the work folder if that was all in it."""
    (work / JOURNAL_NAME).unlink(missing_ok=True)
    if not any(work.iterdir()):
        work.rmdir()
