"""The likeliest tokens of each position, kept small, and the divergence between two such records."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from step128_evals.perplexity.scoring import Label, Top

MAX_TOP_K = 1000
"""8 bytes a position and token before compression: 20 of them are about 130 bytes, 1000 about 6 kB."""

_ROUNDING = 1e-6
"""Probabilities from float32 log-probabilities sum to 1 within this; a rest below it is no evidence."""


def pack_floats(values: Sequence[float]) -> str:
    """Float32, compressed, as text."""
    return base64.b64encode(zlib.compress(np.asarray(values, dtype="<f4").tobytes())).decode()


def unpack_floats(text: str) -> NDArray[np.float64]:
    """What :func:`pack_floats` wrote, as float64."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<f4").astype(np.float64)


def pack_tops(tops: Sequence[Top]) -> dict[str, str]:
    """Tokens and log-probabilities of all positions."""
    labels = json.dumps([list(top) for top in tops], separators=(",", ":")).encode()
    return {
        "tokens": base64.b64encode(zlib.compress(labels)).decode(),
        "logprobs": pack_floats([logprob for top in tops for logprob in top.values()]),
    }


def unpack_tops(packed: dict[str, Any]) -> list[Top]:
    """What :func:`pack_tops` wrote."""
    rows: list[list[Label]] = json.loads(zlib.decompress(base64.b64decode(packed["tokens"])))
    logprobs = iter(unpack_floats(packed["logprobs"]).tolist())
    return [{label: next(logprobs) for label in row} for row in rows]


def divergence(reference: Top, other: Top) -> tuple[float, float]:
    """Lower bound of KL(reference || other), in nats, from the tokens that both know; all others are one bucket.

    Merging outcomes never raises a KL divergence (data-processing inequality, Cover & Thomas, Elements of Information
    Theory, 2.8), so what the truncation hides can only add to it.

    Returns:
        The bound, and the reference's probability of the tokens that both know.
    """
    kl = kept = other_kept = 0.0
    for label, logprob in reference.items():
        if label in other:
            probability = math.exp(logprob)
            kl += probability * (logprob - other[label])
            kept += probability
            other_kept += math.exp(other[label])
    rest, other_rest = 1.0 - kept, 1.0 - other_kept
    if rest > 0:
        kl += rest * math.log(rest / max(other_rest, _ROUNDING))
    return max(kl, 0.0), min(kept, 1.0)
