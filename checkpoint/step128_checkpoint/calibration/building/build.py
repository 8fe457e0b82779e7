"""Builds a sample set from a mixture: quotas by weight, shortfalls made up by other parts and recorded, one rename."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from step128_checkpoint.calibration.building.documents import Document
from step128_checkpoint.calibration.building.encoding import Encoder
from step128_checkpoint.calibration.building.mixture import (
    DEFAULT_SAMPLES,
    DEFAULT_TOKENS_PER_SAMPLE,
    MIN_TOKENS_PER_SAMPLE,
    Mixture,
)
from step128_checkpoint.calibration.building.packing import Draft, PartDraw
from step128_checkpoint.calibration.building.sources import open_source
from step128_checkpoint.calibration.samples import (
    FORMAT,
    FORMAT_VERSION,
    IMAGES_FOLDER,
    SAMPLES_NAME,
    TOKEN_IDS_NAME,
    SamplePart,
    SampleSet,
    open_samples,
)
from step128_checkpoint.errors import CheckpointError, ConfigurationError, OutputError
from step128_checkpoint.files import sync_folder
from step128_checkpoint.places import made_folders
from step128_checkpoint.shards import disk_error, write_synced


def build_samples(
    mixture: Mixture,
    tokenizer_folder: Path,
    out: Path,
    samples: int = DEFAULT_SAMPLES,
    tokens_per_sample: int = DEFAULT_TOKENS_PER_SAMPLE,
    seed: int = 0,
    on_sample: Callable[[], None] = lambda: None,
) -> SampleSet:
    """Draw, tokenize and write a sample set; the same arguments and sources give the same bytes.

    Args:
        mixture: what to draw from.
        tokenizer_folder: a checkpoint's folder: tokenizer, chat template and, for pictures, config.json.
        out: folder to make; it appears when everything in it is complete.
        samples: how many. A part that runs dry is made up for by the others; the result says so.
        tokens_per_sample: longest sample, before a part's length factor.
        seed: of every choice.
        on_sample: called after each sample.

    Raises:
        InputNotFoundError: a folder or the tokenizer is missing.
        ConfigurationError: the mixture does not fit the checkpoint, or a package is missing.
        CheckpointError: a source is bad, or all of them together hold no sample.
        OutputError: ``out`` exists or cannot be written.
    """
    if not mixture.parts:
        raise ConfigurationError(f"mixture {mixture.name}: no part is left to draw from")
    if samples < 1 or tokens_per_sample < MIN_TOKENS_PER_SAMPLE:
        raise ConfigurationError(f"at least 1 sample of {MIN_TOKENS_PER_SAMPLE} tokens is needed")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out} exists already. Choose another folder, or delete this one.")
    encoder = Encoder(tokenizer_folder)
    sources = [open_source(part, seed, tokens_per_sample) for part in mixture.parts]
    try:
        _remove_leftovers(out)
        work = out.with_name(f".{out.name}.{os.getpid()}.partial")
        with made_folders(work), _removed_if_it_fails(work):
            images = _ImageStore(work)
            seen: set[bytes] = set()
            draws = [
                PartDraw(part, documents, encoder, tokens_per_sample, seen, images.save, seed)
                for part, documents in zip(mixture.parts, sources, strict=True)
            ]
            wanted = _draw(mixture, draws, samples, on_sample)
            document = _write(work, draws, wanted, images.sha256, seed)
            document |= {
                "tokenizer_sha256": encoder.sha256,
                "vocabulary": encoder.vocabulary,
                "seed": seed,
                "tokens_per_sample": tokens_per_sample,
                "python": platform.python_version(),  # its library is what builtin sources draw from
            }
            write_synced(work / SAMPLES_NAME, json.dumps(document, indent=1).encode() + b"\n")
            os.rename(work, out)  # noqa: PTH104  replaces an empty folder
            sync_folder(out.parent)
    except OSError as error:
        raise disk_error(out, error) from error
    return open_samples(out)


def _remove_leftovers(out: Path) -> None:
    """Remove what runs for the same output left behind when they were killed: their process is gone."""
    name = re.compile(rf"\.{re.escape(out.name)}\.([0-9]{{1,9}})\.partial")
    for path in out.parent.iterdir() if out.parent.is_dir() else ():
        match = name.fullmatch(path.name)
        if match and not _runs(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)  # another user's is in nobody's way


def _runs(process: int) -> bool:
    if process == os.getpid():  # a killed run's, in a container where every run has this number: ours has not begun
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _removed_if_it_fails(work: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _draw(mixture: Mixture, draws: list[PartDraw], samples: int, on_sample: Callable[[], None]) -> list[int]:
    """Fill every part's quota, then what is missing from the parts that have more; returns the quotas."""
    wanted = mixture.quotas(samples)
    for draw, quota in zip(draws, wanted, strict=True):
        draw.fill(quota, on_sample)
    while (missing := samples - sum(len(draw.drafts) for draw in draws)) > 0:
        left = [draw for draw in draws if not draw.exhausted]
        if not left:
            break
        extra = Mixture(mixture.name, tuple(draw.part for draw in left)).quotas(missing)
        for draw, quota in zip(left, extra, strict=True):
            draw.fill(len(draw.drafts) + quota, on_sample)
    if not any(draw.drafts for draw in draws):
        raise CheckpointError(f"mixture {mixture.name}: its sources hold nothing that fits; not one sample was made")
    return wanted


def _write(
    work: Path, draws: list[PartDraw], wanted: list[int], image_hashes: dict[str, str], seed: int
) -> dict[str, Any]:
    """Write the token ids; returns what samples.json says about parts, samples and files."""
    drafts: list[tuple[int, Draft]] = [(i, draft) for i, draw in enumerate(draws) for draft in draw.drafts]
    # Mixed, so that the first few samples of a set stand for all of it.
    random.Random(f"{seed}/order").shuffle(drafts)
    starts = np.cumsum([0, *(len(draft.ids) for _, draft in drafts)], dtype=np.int64)
    token_ids = np.concatenate([draft.ids for _, draft in drafts]).astype(np.int32)
    data = save({"token_ids": token_ids, "starts": starts})
    write_synced(work / TOKEN_IDS_NAME, data)
    used = {name for _, draft in drafts for name in draft.images}
    for name in sorted(set(image_hashes) - used):  # of documents that were packed for a sample no longer needed
        (work / name).unlink()
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "mixture": [asdict(_summary(draw, quota)) for draw, quota in zip(draws, wanted, strict=True)],
        "samples": [{"part": i, "held_out": draft.held_out, "images": list(draft.images)} for i, draft in drafts],
        "files": {
            TOKEN_IDS_NAME: hashlib.sha256(data).hexdigest(),
            **{name: image_hashes[name] for name in sorted(used)},
        },
    }


def _summary(draw: PartDraw, wanted: int) -> SamplePart:
    part, drafts = draw.part, draw.drafts
    return SamplePart(
        name=part.name,
        kind=part.kind,
        source=part.source,
        weight=float(part.weight),
        wanted=wanted,
        samples=len(drafts),
        tokens=sum(len(draft.ids) for draft in drafts),
        held_out=sum(draft.held_out for draft in drafts),
        images=sum(len(draft.images) for draft in drafts),
        left_out=draw.left_out,
    )


class _ImageStore:
    """Writes pictures as they are drawn, so that they need not all be in memory. ``sha256``: file name -> hash."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self.sha256: dict[str, str] = {}

    def save(self, document: Document) -> list[str]:
        names = []
        for image in document.images:
            name = f"{IMAGES_FOLDER}/{len(self.sha256):06}.png"
            path = self._work / name
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as stream:
                image.save(stream, "PNG")
                stream.flush()
                os.fsync(stream.fileno())
            self.sha256[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            names.append(name)
        return names
