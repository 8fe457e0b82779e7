"""Keeps vLLM's log from filling the disk while it serves for months."""

import os
import shutil
from pathlib import Path

MAXIMUM_BYTES = 64 * 2**20


def old_part(log: Path) -> Path:
    """Return where the part of `log` goes that is cut off."""
    return log.with_name(log.name + ".old")


def cap_log(log: Path, maximum_bytes: int = MAXIMUM_BYTES) -> bool:
    """Copy a log that has grown beyond `maximum_bytes` to `log`.old and empty it; return whether that was done.

    Copied and emptied, not renamed: vLLM's processes hold the file open, and would go on writing to the renamed one.
    They write at its end (O_APPEND, process.py), so nothing is left but a new, short file; a line that is written
    between the two steps is lost. One old part is kept: the log takes at most twice the maximum.

    Raises:
        OSError: neither can be written; the log then stays as it is.

    """
    if not log.exists() or log.stat().st_size <= maximum_bytes:
        return False
    old = old_part(log)
    partial = old.with_name(old.name + ".partial")
    try:
        shutil.copyfile(log, partial)
        partial.chmod(0o600)
        partial.replace(old)
        os.truncate(log, 0)
    finally:
        partial.unlink(missing_ok=True)
    return True


def keep_earlier_logs(log: Path, keep: int) -> None:
    """Rename `log` to `log`.1, `log`.1 to `log`.2 and so on up to `keep`, so that the next start finds no log.

    An old part goes with its log, to `log`.1.old, and ends with the next start: five of them would take too much.

    Raises:
        OSError: the folder cannot be written.

    """
    newest = log.with_name(f"{log.name}.1")
    old_part(newest).unlink(missing_ok=True)
    for number in range(keep - 1, -1, -1):
        source = log.with_name(f"{log.name}.{number}") if number else log
        if source.exists():
            source.replace(log.with_name(f"{log.name}.{number + 1}"))
    if newest.exists() and old_part(log).exists():
        old_part(log).replace(old_part(newest))
    old_part(log).unlink(missing_ok=True)
