"""The text the tiny model learns from: Python's own standard library, and generated dialogues.

The library is at hand wherever Python is, and needs no download. It differs between Python versions: that is why the
cache key holds the version.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .dialogues import random_dialogue
from .tokenizer import END, IMAGE, IMAGE_END, IMAGE_START, render

_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "__pycache__"}
_SKIPPED_FOLDERS |= {"ensurepip", "pydoc_data", "turtledemo"}
HELD_OUT_SHARE = 12  # one file in this many is kept for evaluation
IMAGE_TOKENS = 169  # placeholders the processor writes for one small image


@cache
def _library() -> tuple[tuple[str, str], ...]:
    """(path relative to the library, text) of each source file, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _SKIPPED_FOLDERS & set(relative.parts) and not relative.parts[0].startswith("config-"):
            found.append((relative.as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    if len(found) < 100:
        raise FileNotFoundError(
            f"{root} holds {len(found)} Python source files, at least 100 are needed to train the tiny model: install "
            "Python with its standard library's sources"
        )
    return tuple(found)


def _is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def training_files() -> Iterator[str]:
    """Text of each file to learn from, each ended by the end token."""
    for name, text in _library():
        if not _is_held_out(name):
            yield text + END


def held_out_text() -> str:
    """Text of the files no tiny model has seen, in one string."""
    return "\n".join(text for name, text in _library() if _is_held_out(name))


def dialogue_texts(count: int, seed: int) -> list[str]:
    """Rendered dialogues; image placeholders are repeated as the processor repeats them."""
    rng = random.Random(seed)
    image = IMAGE_START + IMAGE * IMAGE_TOKENS + IMAGE_END
    texts = []
    for _ in range(count):
        dialogue = random_dialogue(rng)
        texts.append(render(dialogue.messages, **dialogue.variables).replace(IMAGE, image))
    return texts
