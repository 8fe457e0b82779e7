"""Documents from a dataset of the hub (or of a local folder), streamed: what is not drawn is not downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from step128_checkpoint.calibration.building.documents import Document, conversation, question
from step128_checkpoint.calibration.building.mixture import IMAGE_KINDS, Part
from step128_checkpoint.errors import CheckpointError, ConfigurationError

_SHUFFLE_ROWS = 1000
_SHUFFLE_PICTURES = 100


def hub_documents(part: Part, seed: int) -> Iterator[Document]:
    """Documents of a dataset's rows, shuffled within a buffer by the seed.

    Raises (at once, or when a bad row's turn comes):
        ConfigurationError: the package `datasets` is missing, or the part names no column or one that is not there.
        CheckpointError: the dataset cannot be opened or read, or a row is no conversation.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"part {part.name!r} needs the package {error.name}. Install it: pip install 'step128[checkpoint]'"
        ) from error
    columns = _columns(part)
    name, _, config = part.place.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=part.split, streaming=True)
        known = rows.column_names or list(next(iter(rows)))
        rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_PICTURES if part.kind in IMAGE_KINDS else _SHUFFLE_ROWS)
    except StopIteration:
        raise CheckpointError(f"part {part.name!r}: {part.source} has no rows in split {part.split}") from None
    except Exception as error:  # the library passes on whatever its many back ends raise
        raise CheckpointError(
            f"part {part.name!r}: {part.source}, split {part.split}, cannot be opened: {error}. Is there a connection, "
            "and access to it (`hf auth login`)?"
        ) from error
    if unknown := [column for column in columns.values() if column not in known]:
        raise ConfigurationError(
            f"part {part.name!r}: {part.source} has no column {unknown[0]!r}. It has: {', '.join(known)}"
        )
    return _documents(part, rows, columns)


def _columns(part: Part) -> dict[str, str]:
    """Which columns the part names: role -> column."""
    roles = ("text", "messages", "question", "answer", "calls", "tools", "image")
    columns = {role: column for role in roles if (column := getattr(part, f"{role}_column"))}
    needed: dict[str, list[set[str]]] = {
        "text": [{"text"}],
        "images": [{"image", "question", "answer"}],
        "multi_image": [{"image", "question", "answer"}],
        "chat": [{"messages"}, {"question", "answer"}],
        "tools": [{"messages"}, {"question", "calls", "tools"}],
    }
    choices = needed.get(part.kind, needed["text"])
    if part.kind in ("text", "code", "long"):
        choices = [*choices, {"messages"}, {"question", "answer"}]  # conversations about code are code too
    if not any(choice <= set(columns) for choice in choices):
        words = ", or ".join(" and ".join(f"{role}_column" for role in sorted(choice)) for choice in choices)
        raise ConfigurationError(f"part {part.name!r}: a dataset for kind {part.kind} needs {words}")
    return columns


def _documents(part: Part, rows: Any, columns: dict[str, str]) -> Iterator[Document]:
    iterator = iter(rows)
    number = 0
    while True:
        number += 1
        where = f"{part.source}, row {number} as shuffled"
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # see above
            raise CheckpointError(f"part {part.name!r}: {where}: cannot be read: {error}") from error
        try:
            document = _document(where, {role: row.get(column) for role, column in columns.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"part {part.name!r}: {where}: {error}") from error
        if document is not None:
            yield document


def _document(where: str, row: dict[str, Any]) -> Document | None:
    """None for a row that is empty: datasets have holes."""
    if "text" in row:
        return Document(where, text=str(row["text"])) if row["text"] else None
    if "messages" in row:
        return conversation(where, row["messages"], row.get("tools")) if row["messages"] else None
    if not row["question"]:
        return None
    if "image" not in row:
        return question(where, str(row["question"]), str(row.get("answer") or ""), row.get("calls"), row.get("tools"))
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    images = [image.convert("RGB") for image in images if image is not None]
    if not images:
        return None
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": str(row["question"])}]
    messages = ({"role": "user", "content": content}, {"role": "assistant", "content": _first(row["answer"])})
    return Document(where, messages=messages, images=tuple(images))


def _first(answer: Any) -> str:
    """Several right answers come as a list."""
    return str(answer[0] if isinstance(answer, list) and answer else answer)
