"""What `tune` leaves on the disk: a journal of every finished candidate, and files that appear whole or not at all."""

import fcntl
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from step128_kernels.errors import KernelToolError
from step128_kernels.tuned.schema import Config


class OutputError(KernelToolError):
    """The output folder cannot be written, or another run's work is in the way."""

    exit_code = 73


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate: seconds of one call, or the problem that rules it out.

    `missed` is a gate of the shipped kernels that it misses: it may serve, but only where nothing meets them all.
    """

    seconds: float | None = None
    problem: str | None = None
    missed: str | None = None


_OUTCOME = tuple(field.name for field in fields(Outcome))


class Journal:
    """The open, locked journal of one file to be written, beside it: a line for what is tuned, then one a candidate.

    Each line is on the disk before the next candidate begins, so a run that is killed loses no finished one.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], restart: bool) -> None:
        """Open the journal of `output`, or start one.

        Args:
            output: the file that the run will write; its folder exists.
            fingerprint: JSON values; work done under others must not be mixed with this run's.
            restart: forget what an earlier run finished.

        Raises:
            OutputError: if it cannot be written, another run has it, or the unfinished run has another fingerprint.

        """
        self.path = output.with_name(f"{output.name}.journal")
        self.finished: dict[str, Outcome] = {}
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load(json.loads(json.dumps(fingerprint)), restart)
        except BlockingIOError:
            self.close()
            raise OutputError(f"{output}: another run is tuning this. Wait for it, or end it.") from None
        except BaseException:
            self.close()
            raise

    def _load(self, fingerprint: dict[str, Any], restart: bool) -> None:
        lines = [] if restart else self.path.read_bytes().splitlines(keepends=True)
        good_bytes = 0
        for number, line in enumerate(lines):
            entry = _parsed(line)
            if entry is None:
                break  # cut off by a kill: nothing from here on is trusted
            if number == 0:
                self._check(entry, fingerprint)
            else:
                self.finished[entry["candidate"]] = Outcome(**{key: entry[key] for key in _OUTCOME})
            good_bytes += len(line)
        os.ftruncate(self._descriptor, good_bytes)
        os.lseek(self._descriptor, 0, os.SEEK_END)
        if good_bytes == 0:
            self._append({"fingerprint": fingerprint})

    def _check(self, entry: dict[str, Any], fingerprint: dict[str, Any]) -> None:
        earlier = entry["fingerprint"]
        differing = [key for key in fingerprint if earlier.get(key) != fingerprint[key]]
        if differing:
            raise OutputError(
                f"{self.path} holds an unfinished run made with another {' and '.join(differing)}. "
                "Finish that one first, or add --restart to start over."
            )

    def record(self, rows: int, config: Config, outcome: Outcome) -> None:
        """Keep what became of a candidate.

        Raises:
            OutputError: if the disk does not take it.

        """
        key = candidate_key(rows, config)
        self.finished[key] = outcome
        self._append({"candidate": key, **asdict(outcome)})

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            os.write(self._descriptor, json.dumps(entry).encode() + b"\n")
            os.fsync(self._descriptor)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        """Release the lock and keep the journal."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Delete the journal of a run that has written its files."""
        self.path.unlink(missing_ok=True)


def candidate_key(rows: int, config: Config) -> str:
    """Return a text that is equal for equal candidates of one kernel, shape and GPU."""
    return json.dumps([rows, dict(config)], sort_keys=True)


def make_folder(path: Path) -> None:
    """Create the output folder and its parents.

    Raises:
        OutputError: if that is not possible.

    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name, flush it to the disk and rename it to `path`.

    Raises:
        OutputError: if the folder or the disk does not allow it; nothing is left behind then.

    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        try:
            with temporary.open("x", encoding="utf-8") as file:
                file.write(json.dumps(document, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    known = isinstance(entry, dict) and ("fingerprint" in entry or {"candidate", *_OUTCOME} <= set(entry))
    return entry if known else None


def _cannot_write(path: Path, error: OSError) -> OutputError:
    found = OutputError(f"{path} cannot be written: {error.strerror}. Choose another folder with --output.")
    if isinstance(error, PermissionError):
        found.exit_code = 5
    return found
