"""The manifest of a product: the SHA-256 of every tensor and file, and which commands made it from what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from step128_checkpoint.errors import CheckpointError
from step128_checkpoint.files import read_json_object
from step128_checkpoint.reader import Checkpoint

MANIFEST_NAME = "step128_manifest.json"
FORMAT, FORMAT_VERSION = "step128-manifest", 1
_STEP_KEYS = ("step128_version", "command", "options", "source")


def headers_sha256(checkpoint: Checkpoint) -> str:
    """Names a checkpoint by its config and its tensors' names, types and shapes (not their data)."""
    tensors = sorted((t.name, t.dtype, list(t.shape)) for t in checkpoint.tensors.values())
    return hashlib.sha256(json.dumps([checkpoint.config, tensors], sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None if it has none.

    Raises:
        CheckpointError: it is of another format.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    manifest = read_json_object(path)
    if (manifest.get("format"), manifest.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(f"{path}: not a manifest of format {FORMAT} version {FORMAT_VERSION}")
    return manifest


def manifest_of(
    source: Checkpoint,
    options: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, str]],
    files: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest of a product made from ``source``.

    Args:
        source: the checkpoint that was converted; its own manifest's history goes on in ``parents``.
        options: of the conversion, with its ``command``.
        tensors: name -> (SHA-256 in hex, file name).
        files: every other file of the product, relative name -> SHA-256 in hex.
    """
    before = read_manifest(source.folder)
    parents = [*before["parents"], {key: before[key] for key in _STEP_KEYS}] if before else []
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step128_version": version("step128"),
        "command": options["command"],
        "options": {key: value for key, value in options.items() if key != "command"},
        "source": {"name": source.folder.resolve().name, "headers_sha256": headers_sha256(source)},
        "parents": parents,
        "files": dict(sorted(files.items())),
        "tensors": {name: {"sha256": sha, "file": file} for name, (sha, file) in sorted(tensors.items())},
    }
