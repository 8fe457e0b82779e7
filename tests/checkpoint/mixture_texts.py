"""Texts for sample sets, and what became of them."""

from __future__ import annotations

import random
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from step128_checkpoint.calibration.samples import SampleSet


def decoded(samples: SampleSet, tokenizer: Path) -> list[str]:
    decoder = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    return [decoder.decode(samples.token_ids(i).tolist()) for i in range(len(samples))]


def words(seed: int, count: int) -> str:
    """Text that no other seed has."""
    rng = random.Random(seed)
    return " ".join(f"{rng.randrange(10**6)}" for _ in range(count))
