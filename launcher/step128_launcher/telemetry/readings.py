"""Reads at each scrape, each for itself: what cannot be used is dropped and counted, and names its source.

A file that never was there is one that this kernel or card does not offer, and says nothing. One that was there before
has vanished with its card or its driver; then, and where a read is denied (amdgpu answers EPERM while it resets or
suspends a card), fails or gives an absurd figure, the source counts as failed in this scrape.
"""

import errno
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from step128_launcher.machine.reader import Reader, whole_number

_DENIED = frozenset({errno.EPERM, errno.EACCES})
# What the driver answers for a figure that this card does not have, though the file is there.
_NOT_OFFERED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODATA})

Source = tuple[str, str]  # what is read, and of which GPU ("" for none)


class Readings(Reader):
    """Reads for one source at a time; the counts last as long as the exporter."""

    def __init__(self, root: Path, say: Callable[[str], None]) -> None:
        super().__init__(root)
        self._say = say
        self.sources: dict[Source, bool] = {}  # those of this scrape, and whether something failed
        self.dropped: Counter[tuple[str, str, str]] = Counter()
        self.unknown_tables: Counter[tuple[str, str]] = Counter()
        self.something_vanished = False
        self._source: Source = ("", "")
        self._seen: set[str] = set()

    def begin(self) -> None:
        """Start a scrape."""
        self.sources = {}
        self.something_vanished = False

    def read_for(self, source: str, gpu: str = "") -> None:
        """Count what follows for this source."""
        self._source = (source, gpu)
        self.sources.setdefault(self._source, False)

    def forget(self, folder: str) -> None:
        """Expect nothing of this folder any more: it belongs to a card or a driver that was replaced."""
        self._seen = {path for path in self._seen if not path.startswith(f"{folder}/")}

    def drop(self, why: str, what: str) -> None:
        """Count what cannot be used as "denied", "failed", "absurd" or "vanished"; the first time, say `what`."""
        self.sources[self._source] = True
        key = (*self._source, why)
        self.dropped[key] += 1
        if self.dropped[key] == 1:
            source = " of ".join(filter(None, self._source))
            self._say(f"telemetry: {source}: {why}: {what} (said once; step128_exporter_dropped_reads_total counts)")

    def data(self, path: Path | str) -> bytes | None:
        """Return what the file holds, or None."""
        name = str(path)
        try:
            with open(name, "rb", buffering=0) as file:  # noqa: PTH123  twice as fast as Path.read_bytes
                found: bytes = file.read()
        except (FileNotFoundError, NotADirectoryError):
            if name in self._seen:
                self.something_vanished = True
                self.drop("vanished", f"{name} was there before")
            return None
        except OSError as error:
            if error.errno in _DENIED:
                self.drop("denied", f"{name}: {error.strerror}")
            elif error.errno not in _NOT_OFFERED or name in self._seen:
                self.drop("failed", f"{name}: {error.strerror}")
            return None
        self._seen.add(name)
        return found

    def text(self, path: Path | str) -> str | None:
        """Return the file's text without surrounding blanks, or None."""
        found = self.data(path)
        return None if found is None else found.decode("utf-8", errors="replace").strip()

    def passing_text(self, path: str) -> str | None:
        """Return the text of a file that may go at any time, such as one of a process; its absence says nothing."""
        found = self.text(path)
        self._seen.discard(path)
        return found

    def number(self, path: str, minimum: int, maximum: int, per: float = 1) -> float | None:
        """Return the file's whole number in units of `per`, if it lies in the bounds."""
        text = self.text(path)
        if text is None:
            return None
        value = whole_number(text)
        if value is None or not minimum <= value <= maximum:
            self.drop("absurd", f"{path} holds {text[:40]!r}, not a number from {minimum} to {maximum}")
            return None
        return value / per

    def names(self, folder: Path) -> list[str]:
        """Return the sorted names in `folder`; none if it does not exist or cannot be listed."""
        try:
            return sorted(entry.name for entry in folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self.drop("denied" if error.errno in _DENIED else "failed", f"{folder}: {error.strerror}")
            return []

    def note(self, path: Path, reason: str) -> None:
        """Count an absurd figure."""
        self.drop("absurd", f"{path}: {reason}")
