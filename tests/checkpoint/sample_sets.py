"""A second, plain writer of sample sets, so that the reader is not its own witness."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from step128_checkpoint.tiny.reference import held_out_tokens

# Longer than the tiny model's sliding window, and all kinds of padding.
LENGTHS, HELD_OUT = (150, 40, 97, 150, 61, 3, 120), (2, 5)


def write_samples(
    folder: Path,
    samples: Sequence[np.ndarray],
    held_out: Sequence[int] = (),
    images: dict[int, list[str]] | None = None,
    vocabulary: int = 2048,
    tokenizer: Path | None = None,
) -> Path:
    """Write token ids of each sample; ``images`` (by sample number) are files that lie in ``folder`` already."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.concatenate(samples).astype("<i4")
    starts = np.cumsum([0, *map(len, samples)]).astype("<i8")
    save_file({"token_ids": ids, "starts": starts}, folder / "token_ids.safetensors")
    images = images or {}
    names = ["token_ids.safetensors", *(name for found in images.values() for name in found)]
    part = {"name": "text", "kind": "text", "source": "test", "weight": 1.0, "wanted": len(samples)}
    part |= {"samples": len(samples), "tokens": len(ids), "held_out": len(held_out), "images": len(names) - 1}
    document = {
        "format": "step128-samples",
        "format_version": 1,
        "seed": 0,
        "tokens_per_sample": int(np.diff(starts).max()),
        "vocabulary": vocabulary,
        "mixture": [part],
        "samples": [
            {"part": 0, "held_out": number in held_out, "images": images.get(number, [])}
            for number in range(len(samples))
        ],
        "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names},
    }
    if tokenizer is not None:
        document["tokenizer_sha256"] = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    (folder / "samples.json").write_text(json.dumps(document))
    return folder


def tiny_ids(tiny: Path) -> list[np.ndarray]:
    """Text for the tiny model, cut to ``LENGTHS``."""
    return np.split(held_out_tokens(tiny, sum(LENGTHS)).numpy(), np.cumsum(LENGTHS)[:-1])


def tiny_samples(tiny: Path, folder: Path) -> Path:
    """A sample set of :func:`tiny_ids`."""
    return write_samples(folder, tiny_ids(tiny), HELD_OUT)
