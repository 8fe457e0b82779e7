"""Result files: JSON lines, a manifest first and then one line an item, so that a run that broke off goes on."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from step128_evals.errors import BadInputError, CannotWriteError
from step128_evals.files import explained_os_errors

FORMAT = 1

Status = Literal["passed", "failed", "measured", "unsupported", "error"]


@dataclass(frozen=True)
class Item:
    """The outcome of one item.

    ``status``: passed or failed when there is a right answer; measured when there is only a figure; unsupported when
    the endpoint cannot; error when it answered wrongly or not at all, which says nothing about the model and is asked
    again on resuming. ``why`` explains the last three and a failure. ``data`` is the eval's own, JSON.
    """

    id: str
    status: Status
    why: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> bool:
        """Whether asking again would be a second measurement and not the first."""
        return self.status != "error"


@dataclass(frozen=True)
class Manifest:
    """What was measured and how.

    ``settings`` holds all that decides what is asked and how it is scored (texts and corpora by their SHA-256): a run
    is resumed only with equal settings. ``endpoint`` is what :func:`probe_endpoint` found when the run began.
    ``items_total``: how many items a whole run has; 0 if that is not known in advance.
    """

    eval: str
    model: str
    base_url: str
    settings: dict[str, Any]
    endpoint: dict[str, Any]
    items_total: int = 0
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    version: str = field(default_factory=lambda: importlib.metadata.version("step128"))
    format: int = FORMAT


@dataclass(frozen=True)
class Run:
    """A result file's content; the last line of an id counts."""

    manifest: Manifest
    items: dict[str, Item]
    path: Path

    @property
    def missing(self) -> int:
        """Items that have no outcome yet; those that ended in an error count as missing."""
        final = sum(item.final for item in self.items.values())
        return max(self.manifest.items_total - final, len(self.items) - final)

    @property
    def missing_words(self) -> str:
        """:attr:`missing` for a person; empty if nothing is."""
        if not self.missing:
            return ""
        total = self.manifest.items_total
        return f"{self.missing} of {total} items missing" if total else "it did not come to its end"

    def with_status(self, *statuses: Status) -> list[Item]:
        """The items of these statuses, in the order in which they were finished."""
        return [item for item in self.items.values() if item.status in statuses]


def read_run(path: Path) -> Run:
    """Read a result file; a last line that a kill cut short is left out.

    Raises:
        InputNotFoundError, PermissionDeniedError: the file cannot be read.
        BadInputError: it is no result file, or of a newer format.
    """
    with explained_os_errors(path):
        return _parse(path, path.read_bytes())


def _parse(path: Path, content: bytes) -> Run:
    whole = content[: content.rfind(b"\n") + 1]
    try:
        first, *lines = [json.loads(line) for line in io.BytesIO(whole)]
        if first["format"] != FORMAT:
            raise BadInputError(f"{path} is a result file of format {first['format']}; this release reads {FORMAT}")
        return Run(Manifest(**first), {line["id"]: Item(**line) for line in lines}, path)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path} is no result file of step128-eval: {error}") from error


class ResultFile:
    """A result file open for appending; made by :func:`open_results`."""

    def __init__(self, path: Path, manifest: Manifest, items: Iterable[Item]) -> None:
        self.path = path
        self.manifest = manifest
        self.items = {item.id: item for item in items}

    def append(self, item: Item) -> None:
        """Write one line, safe on disk when this returns.

        Raises:
            CannotWriteError: the disk is full, say.
        """
        line = json.dumps(asdict(item), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            with self.path.open("ab") as stream:
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise CannotWriteError(f"{self.path}: {error.strerror}") from error
        self.items[item.id] = item

    def pending(self, ids: Iterable[str]) -> list[str]:
        """Those of the ids that have no final item yet: those never asked, then those that ended in an error.

        So errors that come again do not keep a run from its other items.
        """
        ids = list(ids)
        never = [id for id in ids if id not in self.items]
        return never + [id for id in ids if id in self.items and not self.items[id].final]

    @property
    def run(self) -> Run:
        """What the file holds now."""
        return Run(self.manifest, dict(self.items), self.path)


def open_results(path: Path, manifest: Manifest, fresh: bool = False) -> ResultFile:
    """Begin a result file, or go on with the one that is there.

    Args:
        path: ends in ``.jsonl``; its folder is made.
        manifest: of the run about to start; only its first line ever says so.
        fresh: keep what is there under ``<path>.old`` and begin anew.

    Raises:
        BadInputError: the file that is there is of another eval, model or settings, or no result file.
        CannotWriteError: the folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh and path.exists():
            path.replace(path.with_name(path.name + ".old"))
        if path.exists():
            run = read_run(path)
            _refuse_difference(run, manifest)
            _drop_torn_line(path)
            return ResultFile(path, run.manifest, run.items.values())
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as stream:
            stream.write(json.dumps(asdict(manifest), ensure_ascii=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CannotWriteError(f"{error.filename or path}: {error.strerror}") from error
    return ResultFile(path, manifest, [])


def _drop_torn_line(path: Path) -> None:
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        with path.open("rb+") as stream:
            stream.truncate(content.rfind(b"\n") + 1)


def _identity(manifest: Manifest) -> dict[str, Any]:
    """What makes two runs one: the server too, or a change would be measured by what was there before it."""
    told = {name: manifest.endpoint.get(name) for name in ("server", "max_context_tokens", "root")}
    server = {"base_url": manifest.base_url, **told}
    settings: dict[str, Any] = json.loads(json.dumps(manifest.settings))
    return {"eval": manifest.eval, "model": manifest.model, **server, **settings}


def _refuse_difference(run: Run, manifest: Manifest) -> None:
    found, wanted = _identity(run.manifest), _identity(manifest)
    different = [name for name in found | wanted if found.get(name) != wanted.get(name)]
    if different:
        lines = "; ".join(f"{name} was {found.get(name)!r} and is now {wanted.get(name)!r}" for name in different[:3])
        raise BadInputError(
            f"{run.path} holds another run: {lines[:600]}. "
            "Choose another file with --out, or begin anew with --fresh (the old one stays as .old)."
        )
