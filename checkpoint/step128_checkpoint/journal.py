"""The journal of an unfinished output: what made it, and the SHA-256 (and notes) of every finished tensor.

JSON lines: the first holds the fingerprint of the run (input, policy, options), each further one a finished tensor.
Lines are synced to disk only where :meth:`Journal.record` is asked to: a hash that reached the disk before its data did
is caught when a resumed run reads the data again, so only work is lost, never correctness.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from step128_checkpoint.errors import OutputError

JOURNAL_NAME = "journal.jsonl"


class Journal:
    """An open, locked journal.

    ``finished`` maps a tensor's name to the SHA-256 of its bytes, in hex; ``notes`` to what its step noted, if any.
    """

    def __init__(self, work_folder: Path, fingerprint: dict[str, Any], restart: bool) -> None:
        """Open the journal in ``work_folder``, or start one.

        Args:
            work_folder: exists; holds nothing but the journal and the output so far.
            fingerprint: JSON values that decide the output's bytes.
            restart: forget what an earlier run finished.

        Raises:
            OutputError: another process is writing there, or the unfinished run there has another fingerprint.
        """
        self.path = work_folder / JOURNAL_NAME
        self.finished: dict[str, str] = {}
        self.notes: dict[str, dict[str, Any]] = {}
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise OutputError(f"{work_folder}: another run is writing here. Wait for it, or end it.") from None
        try:
            self._load(work_folder, fingerprint, restart)
        except BaseException:
            self.close()
            raise

    def _load(self, work_folder: Path, fingerprint: dict[str, Any], restart: bool) -> None:
        lines = [] if restart else self.path.read_bytes().splitlines(keepends=True)
        good_bytes = 0
        for number, line in enumerate(lines):
            entry = _parse(line)
            if number == 0:
                if entry is None or not _is_first_entry(entry):
                    break
                if differing := _differences(entry["fingerprint"], fingerprint):
                    raise OutputError(
                        f"{work_folder} holds an unfinished run that differs from this one in {differing}. "
                        "Repeat it with the same input and options to finish it, or add --restart to start over."
                    )
            elif entry is not None and isinstance(entry.get("tensor"), str) and isinstance(entry.get("sha256"), str):
                self._keep(entry["tensor"], entry["sha256"], entry.get("notes"))
            else:
                break  # cut off by a kill, or damaged: nothing from here on is trusted
            good_bytes += len(line)
        os.ftruncate(self._descriptor, good_bytes)
        os.lseek(self._descriptor, 0, os.SEEK_END)
        if good_bytes == 0:
            try:
                self._append({"fingerprint": fingerprint})
                os.fsync(self._descriptor)  # this line proves whose folder it is
            except BaseException:
                self.path.unlink()
                raise

    def record(
        self, tensor_name: str, sha256_hex: str, notes: dict[str, Any] | None = None, *, sync: bool = False
    ) -> None:
        """Note that a tensor's bytes are all written, and what its step wants kept (JSON values).

        With ``sync`` the note is on disk when this returns: for work too long to do twice after a power cut.
        """
        self._keep(tensor_name, sha256_hex, notes)
        self._append({"tensor": tensor_name, "sha256": sha256_hex} | ({"notes": notes} if notes else {}))
        if sync:
            os.fsync(self._descriptor)

    def _keep(self, tensor_name: str, sha256_hex: str, notes: dict[str, Any] | None) -> None:
        self.finished[tensor_name] = sha256_hex
        if notes:
            self.notes[tensor_name] = notes

    def _append(self, entry: dict[str, Any]) -> None:
        os.write(self._descriptor, json.dumps(entry).encode() + b"\n")

    def close(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)


def is_journal(path: Path) -> bool:
    """Whether a file is the journal of one of our runs, by its first line."""
    return fingerprint_of(path) is not None


def fingerprint_of(path: Path) -> dict[str, Any] | None:
    """What the run that left a journal was to make; None if the file is no journal of ours."""
    if path.is_symlink() or not path.is_file():
        return None
    with path.open("rb") as stream:
        entry = _parse(stream.readline(1 << 20))
    return dict(entry["fingerprint"]) if entry is not None and _is_first_entry(entry) else None


def _is_first_entry(entry: dict[str, Any]) -> bool:
    fingerprint = entry.get("fingerprint")
    return isinstance(fingerprint, dict) and {"command", "input"} <= set(fingerprint)


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Name what differs, with both values where they are short enough to read."""
    differing = []
    for key in sorted(set(old) | set(new)):
        if old.get(key) != new.get(key):
            values = f"{old.get(key)!r}, now {new.get(key)!r}"
            differing.append(f"{key} ({values})" if len(values) < 100 else key)
    return ", ".join(differing)
