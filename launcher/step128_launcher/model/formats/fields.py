"""Typed values out of a quantization_config; every complaint names the file and the key."""

from pathlib import Path
from typing import Any

from step128_launcher.errors import CheckpointError


class Fields:
    """One object of config.json; `prefix` is its place, such as "quantization_config."."""

    def __init__(self, path: Path, section: dict[str, Any], prefix: str) -> None:
        self.path, self.section, self.prefix = path, section, prefix

    def bad(self, key: str, value: Any, wanted: str) -> CheckpointError:
        """Return the complaint about one value."""
        return CheckpointError(f"{self.path}: {self.prefix}{key} is {value!r}; this release reads {wanted}.")

    def optional(self, key: str) -> Any:
        """Return a value of any type, or None."""
        return self.section.get(key)

    def choice(self, key: str, *known: Any, default: Any = None) -> Any:
        """Return a value that is one of `known`."""
        value = self.section.get(key, default)
        if isinstance(value, bool) != isinstance(known[0], bool) or value not in known:
            raise self.bad(key, value, " or ".join(map(repr, known)))
        return value

    def group_size(self, key: str) -> int | None:
        """Return the weights of a row that share a scale; None: the whole row (written as -1 or null)."""
        value = self.section.get(key)
        if value in (None, -1):
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.bad(key, value, "a positive whole number, or -1 for a whole row")
        return value

    def inner(self, key: str) -> "Fields":
        """Return an object below this one."""
        value = self.section.get(key)
        if not isinstance(value, dict):
            raise self.bad(key, value, "an object")
        return Fields(self.path, value, f"{self.prefix}{key}.")
