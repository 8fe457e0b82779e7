"""Reading single figures below a root: each may be missing or unusable alone, and never stops the probe.

A file that is not there is normal (this kernel or card does not offer the figure) and says nothing. A file that is
there and cannot be used leaves one line in `notes`: sysfs answers EPERM for a GPU the container may not use, and an
absurd figure (0xFFFF, 2^64-1) while a card is suspended or being reset.
"""

import errno
from pathlib import Path

MAX_MEMORY_BYTES = 2**46  # 64 TiB; above it a figure is a driver's "unknown", not a size


class Reader:
    """Reads below `root`; `notes` collects what was there and unusable, each with its reason."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.notes: list[str] = []
        self.denied: set[Path] = set()

    def text(self, path: Path) -> str | None:
        """Return the file's text without surrounding blanks, or None."""
        try:
            return path.read_text(encoding="utf-8", errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES):
                self.denied.add(path)
            self.note(path, error.strerror or type(error).__name__)
            return None

    def integer(self, path: Path, minimum: int = 0, maximum: int = MAX_MEMORY_BYTES) -> int | None:
        """Return the file's whole number if it lies from `minimum` to `maximum`, or None."""
        text = self.text(path)
        return None if text is None else self.bounded(path, text, minimum, maximum)

    def bounded(self, path: Path, text: str, minimum: int, maximum: int) -> int | None:
        """Return the whole number in `text`, which `path` holds, if it lies in the bounds; note it otherwise."""
        value = whole_number(text)
        if value is None or not minimum <= value <= maximum:
            wanted = "no whole number" if value is None else f"not from {minimum} to {maximum}"
            self.note(path, f"{text[:40]!r} is {wanted}")
            return None
        return value

    def names(self, folder: Path) -> list[str]:
        """Return the sorted names in `folder`; none if it does not exist or cannot be listed."""
        try:
            return sorted(entry.name for entry in folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self.note(folder, error.strerror or type(error).__name__)
            return []

    def note(self, path: Path, reason: str) -> None:
        """Remember that `path` was there and unusable."""
        shown = f"/{path.relative_to(self.root)}" if path.is_relative_to(self.root) else str(path)
        self.notes.append(f"{shown}: {reason}")


def exists(path: Path) -> bool:
    """Whether `path` is there as far as this process may see; Path.exists raises where a folder may not be entered."""
    try:
        path.stat()
    except OSError:
        return False
    return True


def whole_number(text: str) -> int | None:
    """Return the decimal number that is all of `text`, or None; longer than any kernel figure counts as none."""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) <= 20 else None
