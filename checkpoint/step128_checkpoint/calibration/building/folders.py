"""Documents from a local folder: texts, code, conversations in JSON, and pictures with captions."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from step128_checkpoint.calibration.building.documents import Document, Message, conversation
from step128_checkpoint.calibration.building.mixture import Part
from step128_checkpoint.errors import CheckpointError, InputNotFoundError
from step128_checkpoint.files import reading

_PROSE = frozenset({".txt", ".md", ".rst", ".markdown", ".tex", ".html"})
_CODE = frozenset(
    {
        ".c",
        ".cc",
        ".cpp",
        ".cs",
        ".css",
        ".cu",
        ".go",
        ".h",
        ".hpp",
        ".java",
        ".jl",
        ".js",
        ".jsx",
        ".kt",
        ".lua",
        ".m",
        ".php",
        ".pl",
        ".py",
        ".r",
        ".rb",
        ".rs",
        ".scala",
        ".sh",
        ".sql",
        ".swift",
        ".toml",
        ".ts",
        ".tsx",
        ".vue",
        ".xml",
        ".yaml",
        ".yml",
        ".zig",
    }
)
_CHATS = frozenset({".jsonl", ".json"})
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"})
_SUFFIXES = {
    "text": _PROSE,
    "code": _CODE,
    "long": _PROSE | _CODE,
    "chat": _CHATS,
    "tools": _CHATS,
    "images": _PICTURES,
    "multi_image": _PICTURES,
}
_QUESTIONS = ("What is in this picture?", "Describe this picture.", "What does this show?", "Write a caption for this.")
_QUESTIONS_ABOUT_MANY = ("Describe each of these pictures.", "What do these pictures show?", "Compare these pictures.")


def folder_documents(part: Part, seed: int) -> Iterator[Document]:
    """Documents of a folder's files (below it too, hidden ones left out), in an order drawn by the seed.

    Raises (at once, or when a bad file's turn comes):
        InputNotFoundError: the folder is missing, or holds no file of this kind.
        CheckpointError: a file cannot be read, is no conversation, or is a picture without a caption.
    """
    folder = Path(part.place).expanduser()
    if not folder.is_dir():
        raise InputNotFoundError(f"part {part.name!r}: no such folder: {folder}")
    suffixes = _SUFFIXES[part.kind]
    with reading(folder):
        files = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in suffixes
            and path.is_file()
            and not any(name.startswith(".") for name in path.relative_to(folder).parts)
        )
    if not files:
        raise InputNotFoundError(
            f"part {part.name!r}: {folder} holds no file for kind {part.kind} ({', '.join(sorted(suffixes))})"
        )
    rng = random.Random(f"{seed}/folder/{part.name}")
    rng.shuffle(files)
    readers: dict[str, Callable[[], Iterator[Document]]] = {
        "chat": lambda: itertools.chain.from_iterable(map(_conversations, files)),
        "tools": lambda: itertools.chain.from_iterable(map(_conversations, files)),
        "images": lambda: _pictures(files, rng, most=1),
        "multi_image": lambda: _pictures(files, rng, most=4),
    }
    return readers.get(part.kind, lambda: map(_text, files))()


def _text(path: Path) -> Document:
    with reading(path):
        return Document(str(path), text=path.read_text(encoding="utf-8", errors="replace"))


def _conversations(path: Path) -> Iterator[Document]:
    with reading(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    entries: list[tuple[str, Any]] = []
    try:
        if path.suffix == ".jsonl":
            for number, line in enumerate(text.splitlines(), start=1):
                where = f"{path}, line {number}"
                if line.strip():
                    entries.append((where, json.loads(line)))
        else:
            where = str(path)
            found = json.loads(text)
            found = [found] if isinstance(found, dict) else found
            entries = [(f"{path}, entry {number}", entry) for number, entry in enumerate(found, start=1)]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: not JSON: {error}") from error
    for where, entry in entries:
        try:
            tools = entry.get("tools") if isinstance(entry, dict) else None
            document = conversation(where, entry, tools)
        except ValueError as error:
            raise CheckpointError(f'{where}: no conversation {{"messages": [...], "tools": [...]}}: {error}') from error
        yield document


def _pictures(files: list[Path], rng: random.Random, most: int) -> Iterator[Document]:
    """Each picture is used once; with ``most`` above 1, two to ``most`` of them a document."""
    from step128_checkpoint.calibration.vision import open_image

    left = list(files)
    while len(left) >= min(most, 2):
        group = [left.pop() for _ in range(min(len(left), 1 if most == 1 else rng.randint(2, most)))]
        captions = [_caption(path) for path in group]
        asked = rng.choice(_QUESTIONS if len(group) == 1 else _QUESTIONS_ABOUT_MANY)
        content: list[Message] = [{"type": "image"} for _ in group]
        answer = captions[0]
        if len(group) > 1:
            answer = "\n".join(f"{number}. {caption}" for number, caption in enumerate(captions, start=1))
        messages = (
            {"role": "user", "content": [*content, {"type": "text", "text": asked}]},
            {"role": "assistant", "content": answer},
        )
        yield Document(str(group[0]), messages=messages, images=tuple(map(open_image, group)))


def _caption(path: Path) -> str:
    caption = path.with_suffix(".txt")
    if not caption.is_file():
        raise CheckpointError(f"{path}: no caption beside it; put what it shows into {caption.name}")
    with reading(caption):
        return caption.read_text(encoding="utf-8", errors="replace").strip()
