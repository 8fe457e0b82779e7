"""A manifest's content, checked and typed: the commands that made a checkpoint, and the hashes of what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.manifest import MANIFEST_NAME, read_manifest


@dataclass(frozen=True)
class RecipeStep:
    """One command of those that made a checkpoint: what it read, and the options that decided its bytes."""

    command: str
    options: dict[str, Any]
    step128_version: str
    source_name: str


@dataclass(frozen=True)
class Recipe:
    """What a manifest says. ``steps`` run from the first command to the one that wrote the folder.

    ``tensors`` maps a tensor's name to (SHA-256 of its bytes in hex, name of its file), ``files`` the relative name of
    every other file to its SHA-256.
    """

    steps: tuple[RecipeStep, ...]
    tensors: dict[str, tuple[str, str]]
    files: dict[str, str]

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands alone, first one first."""
        return tuple(step.command for step in self.steps)


def read_recipe(folder: Path) -> Recipe | None:
    """Read the manifest of a checkpoint folder; None if it has none.

    Raises:
        CheckpointError: it cannot be read, is of another format, or is malformed.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    try:
        steps = tuple(_step(entry) for entry in [*manifest["parents"], manifest])
        tensors = {str(name): (str(row["sha256"]), str(row["file"])) for name, row in manifest["tensors"].items()}
        files = {str(name): str(sha256) for name, sha256 in manifest["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST_NAME}: malformed: {error!r}") from error
    return Recipe(steps, tensors, files)


def _step(entry: dict[str, Any]) -> RecipeStep:
    source = entry.get("source") or {}
    return RecipeStep(
        str(entry["command"]), dict(entry["options"]), str(entry["step128_version"]), str(source.get("name", "unknown"))
    )
