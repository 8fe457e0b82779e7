"""A mixture file: which sources the samples are drawn from, and in which shares."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from step128_checkpoint.errors import ConfigurationError
from step128_checkpoint.policy import configs_folder

FORMAT, FORMAT_VERSION = "step128-mixture", 1
DEFAULT_MIXTURE = "offline"
DEFAULT_SAMPLES = 3072
DEFAULT_TOKENS_PER_SAMPLE = 2048
MIN_TOKENS_PER_SAMPLE = 16
KINDS = ("text", "code", "chat", "tools", "long", "images", "multi_image")
IMAGE_KINDS = frozenset({"images", "multi_image"})
SOURCES = ("builtin", "folder", "hf")


@dataclass(frozen=True)
class Part:
    """One part of a mixture.

    ``source`` is ``builtin:NAME``, ``folder:PATH`` or ``hf:DATASET[:CONFIG]``; ``weight`` its share of the samples;
    ``length_factor`` how many times longer its samples are than the others'. The rest says where a dataset of the hub
    has what: ``text_column``, or ``messages_column``, or ``question_column`` with ``answer_column`` or
    ``calls_column``; and ``tools_column``, ``image_column`` (for images, with question and answer).
    """

    name: str
    kind: str
    source: str
    weight: float
    length_factor: int = 1
    split: str = "train"
    text_column: str | None = None
    messages_column: str | None = None
    question_column: str | None = None
    answer_column: str | None = None
    calls_column: str | None = None
    tools_column: str | None = None
    image_column: str | None = None

    @property
    def scheme(self) -> str:
        """``builtin``, ``folder`` or ``hf``."""
        return self.source.partition(":")[0]

    @property
    def place(self) -> str:
        """What the source names: a generator, a folder, or a dataset."""
        return self.source.partition(":")[2]


@dataclass(frozen=True)
class Mixture:
    """Parts with their weights; ``name`` for messages."""

    name: str
    parts: tuple[Part, ...] = field(default_factory=tuple)

    def quotas(self, samples: int) -> list[int]:
        """Samples of each part, by weight, that add up to ``samples``: the largest remainders are rounded up."""
        total = sum(part.weight for part in self.parts)
        exact = [samples * part.weight / total for part in self.parts]
        quotas = [math.floor(value) for value in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])
        for i in by_remainder[: samples - sum(quotas)]:
            quotas[i] += 1
        return quotas

    def without_images(self) -> Mixture:
        """The mixture without its parts that hold pictures."""
        return Mixture(self.name, tuple(part for part in self.parts if part.kind not in IMAGE_KINDS))


def load_mixture(name: str = DEFAULT_MIXTURE) -> Mixture:
    """Read a mixture file: a path ending in .yaml or .yml, or the name of one in ``configs/calibration``.

    Raises:
        ConfigurationError: it is missing, or something in it is unknown or wrong; names the file and the part.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = configs_folder() / "calibration" / f"{name}.yaml"
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        shipped = ", ".join(sorted(file.stem for file in (configs_folder() / "calibration").glob("*.yaml")))
        raise ConfigurationError(f"{path}: no such mixture file. Shipped are: {shipped}") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"{path}: not valid YAML: {error}") from error
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(document, dict) or (document.get("format"), document.get("format_version")) != (
        FORMAT,
        FORMAT_VERSION,
    ):
        raise ConfigurationError(f"{path}: `format: {FORMAT}` and `format_version: {FORMAT_VERSION}` are needed")
    entries = document.get("parts")
    if not isinstance(entries, list) or not entries:
        raise ConfigurationError(f"{path}: `parts` must be a list of at least one part")
    parts = tuple(_part(path, entry, number) for number, entry in enumerate(entries, start=1))
    names = [part.name for part in parts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigurationError(f"{path}: two parts are named {twice[0]!r}")
    return Mixture(path.stem, parts)


def _part(path: Path, entry: Any, number: int) -> Part:
    if not isinstance(entry, dict):
        raise ConfigurationError(f"{path}: part {number} must be a mapping with name, kind, source and weight")
    where = f"{path}: part {entry.get('name', number)!r}"
    known = {field.name for field in fields(Part)}
    if unknown := [key for key in entry if key not in known]:
        raise ConfigurationError(f"{where}: unknown key {unknown[0]!r}. Known: {', '.join(sorted(known))}")
    if missing := [key for key in ("name", "kind", "source", "weight") if key not in entry]:
        raise ConfigurationError(f"{where}: {missing[0]} is missing")
    for key, value in entry.items():
        if key not in ("weight", "length_factor") and not isinstance(value, str):
            raise ConfigurationError(f"{where}: {key} must be text, found {value!r}")
    if entry["kind"] not in KINDS:
        raise ConfigurationError(f"{where}: kind {entry['kind']!r} is unknown. Known: {', '.join(KINDS)}")
    weight, factor = entry["weight"], entry.get("length_factor", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ConfigurationError(f"{where}: weight must be a number above 0, found {weight!r}")
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
        raise ConfigurationError(f"{where}: length_factor must be a whole number from 1, found {factor!r}")
    part = Part(**entry)
    if part.scheme not in SOURCES or not part.place:
        raise ConfigurationError(
            f"{where}: source {part.source!r} must be builtin:NAME, folder:PATH or hf:DATASET[:CONFIG]"
        )
    return part
