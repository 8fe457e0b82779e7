"""A sample set: the token sequences, and the pictures in them, that every statistic of a calibration is taken over.

Folder: ``samples.json`` (mixture, seed, and for each sample its part, side and pictures), ``token_ids.safetensors``
(``token_ids`` I32 [total], ``starts`` I64 [n + 1]) and ``images/*.png``. Placeholders of pictures are in the token ids,
as many as the model makes features of them. ``step128-checkpoint samples`` makes one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from step128_checkpoint.errors import CheckpointError, InputNotFoundError
from step128_checkpoint.files import read_json_object, reading
from step128_checkpoint.header import read_header
from step128_checkpoint.reader import Checkpoint

SAMPLES_NAME = "samples.json"
TOKEN_IDS_NAME = "token_ids.safetensors"
IMAGES_FOLDER = "images"
FORMAT, FORMAT_VERSION = "step128-samples", 1

HELD_OUT_SHARE = 16
"""One sample in this many of every part is held out."""


@dataclass(frozen=True)
class SamplePart:
    """One part of the mixture as it was drawn; ``kind`` is one of text, code, chat, tools, long, images, multi_image.

    ``wanted`` samples were asked for; ``samples`` is less where the source ran dry, more where it stood in for others.
    ``left_out`` documents were repeats, did not fit into a sample, or could not be rendered.
    """

    name: str
    kind: str
    source: str
    weight: float
    wanted: int
    samples: int
    tokens: int
    held_out: int
    images: int
    left_out: int = 0


@dataclass(frozen=True)
class SampleSet:
    """An opened sample set; ``document`` is samples.json as it stands. ``held_out`` is bool [n]."""

    folder: Path
    document: dict[str, Any]
    mixture: tuple[SamplePart, ...]
    sha256: str
    held_out: NDArray[np.bool_]
    _token_ids: NDArray[np.int32]
    _starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.held_out)

    def token_ids(self, number: int) -> NDArray[np.int32]:
        """Token ids of one sample, int32 [T]; read-only."""
        return self._token_ids[self._starts[number] : self._starts[number + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample, int64 [n]."""
        return np.diff(self._starts)

    @property
    def total_tokens(self) -> int:
        """Tokens of all samples, the held-out ones included."""
        return int(self._starts[-1])

    @property
    def seed(self) -> int:
        """The seed that the set was drawn with."""
        return int(self.document["seed"])

    def domain(self, number: int) -> str:
        """Name of the mixture's part that a sample is from."""
        part: int = self.document["samples"][number]["part"]
        return self.mixture[part].name

    def images(self, number: int) -> tuple[Path, ...]:
        """PNG files of the pictures in one sample, in the order of their placeholders."""
        return tuple(self.folder / name for name in self.document["samples"][number]["images"])


def open_samples(folder: Path) -> SampleSet:
    """Open a sample set and check all of it: hashes of every file, ascending starts, ids within the vocabulary.

    Raises:
        InputNotFoundError: there is none, or a file of it is missing.
        CheckpointError: it is of another format, or was changed since it was made.
    """
    path = folder / SAMPLES_NAME
    if not path.is_file():
        raise InputNotFoundError(f"{folder}: holds no {SAMPLES_NAME}; make one with `step128-checkpoint samples`")
    document = read_json_object(path)
    if (document.get("format"), document.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(f"{path}: not a sample set of format {FORMAT} version {FORMAT_VERSION}")
    try:
        mixture = tuple(SamplePart(**part) for part in document["mixture"])
        samples, files = document["samples"], dict(document["files"])
        parts = [int(sample["part"]) for sample in samples]
        held_out = np.asarray([bool(sample["held_out"]) for sample in samples], dtype=np.bool_)
        images = [str(name) for sample in samples for name in sample["images"]]
        vocabulary = int(document["vocabulary"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {error!r}. Make the samples again.") from error
    if any(not 0 <= part < len(mixture) for part in parts):
        raise CheckpointError(f"{path}: a sample is of a part that the mixture does not have")
    if unhashed := [name for name in (TOKEN_IDS_NAME, *images) if name not in files]:
        raise CheckpointError(f"{path}: {unhashed[0]} has no hash. Make the samples again.")
    for name, expected in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path}: {name!r} lies outside the folder")
        with reading(folder / name):
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            raise CheckpointError(f"{folder / name}: changed since the samples were made. Make them again.")
    token_ids, starts = _read_token_ids(folder / TOKEN_IDS_NAME)
    _check(folder / TOKEN_IDS_NAME, token_ids, starts, len(samples), vocabulary)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()  # the other files' hashes are in it
    return SampleSet(folder, document, mixture, sha256, held_out, token_ids, starts)


def _read_token_ids(path: Path) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    with Checkpoint(path.parent, {}, read_header(path)) as source:
        found = {name: (tensor.dtype, len(tensor.shape)) for name, tensor in source.tensors.items()}
        if found != {"token_ids": ("I32", 1), "starts": ("I64", 1)}:
            raise CheckpointError(f"{path}: token_ids I32 [total] and starts I64 [n + 1] are needed, found {found}")
        token_ids = np.frombuffer(source.read("token_ids"), dtype="<i4")
        starts = np.frombuffer(source.read("starts"), dtype="<i8")
    return token_ids, starts


def _check(path: Path, token_ids: NDArray[np.int32], starts: NDArray[np.int64], samples: int, vocabulary: int) -> None:
    if len(starts) != samples + 1:
        raise CheckpointError(f"{path}: {len(starts)} starts for {samples} samples; {samples + 1} are needed")
    if starts[0] != 0 or starts[-1] != len(token_ids) or bool((np.diff(starts) <= 0).any()):
        raise CheckpointError(f"{path}: starts must ascend from 0 to the number of tokens, {len(token_ids)}")
    if samples and (int(token_ids.min()) < 0 or int(token_ids.max()) >= vocabulary):
        raise CheckpointError(f"{path}: a token id is outside the vocabulary of {vocabulary}")
