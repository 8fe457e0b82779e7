"""The text that is scored: a file, standard input, or the documents of a Hugging Face data set, on the hub or local."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from step128_evals.errors import BadInputError, EvalError
from step128_evals.files import read_text_argument, sha256

SEPARATORS = {"blank-line": "\n\n", "newline": "\n", "none": ""}
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".md": "text"}


@dataclass(frozen=True)
class Documents:
    """Texts in a fixed order, empty ones too; ``label`` says where they are from."""

    label: str
    texts: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        """Of all texts; of a single one, that of its own UTF-8."""
        return sha256("\0".join(self.texts))

    def joined(self, separator: str) -> str:
        """All as one text."""
        return separator.join(self.texts)


def read_documents(text: str | None, dataset: str | None, field: str, limit: int | None) -> Documents:
    """Read what the options name.

    Args:
        text: a file's name, or ``-``; one document.
        dataset: ``NAME[:CONFIG[:SPLIT]]``, used if ``text`` is None; a row is a document. NAME is a data set of the
            hub, or a local file (jsonl, json, parquet, csv, txt) or folder.
        field: the rows' key of the text.
        limit: the first of them, no more than these; of a data set only.

    Raises:
        InputNotFoundError, PermissionDeniedError: as :func:`read_text_argument`.
        BadInputError: ``limit`` with a file; or the data set cannot be loaded, lacks the split or field, has no text.
    """
    if text is not None:
        if limit is not None:
            raise BadInputError("--documents is of --dataset; a text file is one document")
        return Documents(text, (read_text_argument(text),))
    if dataset is None:
        raise BadInputError("nothing to score: pass --text FILE or --dataset NAME")
    rows, label = _open(dataset)
    texts = tuple(islice(_texts(rows, field, label), limit))
    if not any(text.strip() for text in texts):
        raise BadInputError(f"{label} has no row with a text in the field {field!r}")
    return Documents(label, texts)


def _open(dataset: str) -> tuple[Iterable[Any], str]:
    from datasets import load_dataset  # type: ignore[import-untyped]

    name, config, split = _parts(dataset)
    path = Path(name)
    with _explained(dataset):
        if path.is_file():
            builder = _BUILDERS.get(path.suffix.lower())
            if builder is None:
                raise BadInputError(f"{name}: a local data set ends in {', '.join(_BUILDERS)}, or is a folder of these")
            # A text file is one document here, and not one a line.
            extra = {"sample_by": "document"} if builder == "text" else {}
            splits: Any = load_dataset(builder, data_files=str(path), streaming=True, **extra)
        else:
            splits = load_dataset(name, config, streaming=True)
    split = split or _default_split(list(splits), dataset)
    if split not in splits:
        raise BadInputError(f"{dataset}: there is no split {split!r}; there are {', '.join(splits)}")
    return splits[split], ":".join(part for part in (name, config or "", split))


def _parts(dataset: str) -> tuple[str, str | None, str | None]:
    if Path(dataset).exists():
        return dataset, None, None
    name, config, split, *rest = [*dataset.split(":"), "", ""]
    if any(rest) or not name:
        raise BadInputError(f"{dataset}: a data set is named NAME, NAME:CONFIG or NAME:CONFIG:SPLIT")
    return name, config or None, split or None


def _default_split(splits: list[str], dataset: str) -> str:
    if "test" in splits:
        return "test"
    if len(splits) == 1:
        return str(splits[0])
    raise BadInputError(f"{dataset} has no split called test; name one of {', '.join(splits)}: NAME:CONFIG:SPLIT")


def _texts(rows: Iterable[Any], field: str, label: str) -> Iterator[str]:
    with _explained(label):
        for row in rows:
            if not isinstance(row.get(field), str):
                raise BadInputError(f"{label}: no text in the field {field!r}; the fields are {', '.join(row)}")
            yield row[field]


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """The library raises whatever the format, the hub or the file system raised: all of it is about this data set."""
    try:
        yield
    except (EvalError, ModuleNotFoundError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[:3] or [type(error).__name__]
        raise BadInputError(f"the data set {name} cannot be loaded: {' '.join(reason)}") from error
