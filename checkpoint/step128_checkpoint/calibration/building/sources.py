"""Where documents come from: what is on every machine, a folder, or a dataset."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from step128_checkpoint.calibration.building import conversations, folders, hub, library, pictures, tool_calls
from step128_checkpoint.calibration.building.documents import Document
from step128_checkpoint.calibration.building.mixture import Part
from step128_checkpoint.errors import ConfigurationError

_CHARACTERS_PER_TOKEN = 5  # generous for code, so that a long text is long enough

_Generator = Callable[[random.Random, int], Iterator[Document]]


def _any_length(generator: Callable[[random.Random], Iterator[Document]]) -> _Generator:
    """Generators whose documents are as long as they are."""
    return lambda rng, tokens: generator(rng)


_BUILTIN: dict[str, dict[str, _Generator]] = {
    "python-library": {
        "code": _any_length(library.code_files),
        "long": lambda rng, tokens: library.long_files(rng, tokens * _CHARACTERS_PER_TOKEN),
    },
    "python-manual": {"text": _any_length(library.manual)},
    "conversations": {"chat": _any_length(conversations.conversations)},
    "tool-calls": {"tools": _any_length(tool_calls.tool_conversations)},
    "pictures": {
        "images": _any_length(pictures.single_pictures),
        "multi_image": _any_length(pictures.several_pictures),
    },
}


def open_source(part: Part, seed: int, tokens_per_sample: int) -> Iterator[Document]:
    """Documents of a part's source in an order drawn by the seed; generated ones may repeat.

    Raises:
        InputNotFoundError: a folder is missing or holds nothing for this kind.
        ConfigurationError: there is no such builtin source, or a package or a column is missing.
        CheckpointError: the source cannot be read.
    """
    if part.scheme == "folder":
        return folders.folder_documents(part, seed)
    if part.scheme == "hf":
        return hub.hub_documents(part, seed)
    kinds = _BUILTIN.get(part.place)
    if kinds is None:
        raise ConfigurationError(
            f"part {part.name!r}: no builtin source {part.place!r}. There are: {', '.join(sorted(_BUILTIN))}"
        )
    if part.kind not in kinds:
        raise ConfigurationError(
            f"part {part.name!r}: builtin:{part.place} is of kind {' or '.join(kinds)}, not {part.kind}"
        )
    tokens = tokens_per_sample * part.length_factor
    return kinds[part.kind](random.Random(f"{seed}/builtin/{part.name}"), tokens)
