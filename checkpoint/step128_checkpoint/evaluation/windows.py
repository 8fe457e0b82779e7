"""The token sequences that are scored, and the words that say how: a perplexity without them compares with nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from step128_checkpoint.calibration.samples import SampleSet
from step128_checkpoint.errors import CheckpointError, ConfigurationError


@dataclass(frozen=True)
class Windows:
    """``numbers`` of ``samples`` are scored, each a sequence that sees no other; ``definition`` says what they are.

    Of each, every token but the first is predicted from those before it. Places of pictures are not scored: what
    stands there is no token.
    """

    samples: SampleSet
    numbers: tuple[int, ...]
    definition: str

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return int(sum(self.samples.lengths[number] for number in self.numbers))

    def targets(self, number: int, image_token_id: int | None) -> tuple[Tensor, Tensor]:
        """Of one window of T tokens: the next token of each position, int64 [T - 1], and whether it is scored, bool."""
        ids = torch.from_numpy(self.samples.token_ids(number)[1:].astype(np.int64))
        scored = torch.ones_like(ids, dtype=torch.bool) if image_token_id is None else ids != image_token_id
        return ids, scored


def token_windows(token_ids: Sequence[Sequence[int] | NDArray[np.integer[Any]]], definition: str) -> Windows:
    """Windows of the given token ids, each of at least two tokens.

    Raises:
        ConfigurationError: there is none, or one is shorter.
    """
    if not token_ids or min(map(len, token_ids)) < 2:
        raise ConfigurationError("nothing to score: each window needs two tokens or more")
    lengths = [len(ids) for ids in token_ids]
    flat = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in token_ids])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    document = {"samples": [{"part": 0, "held_out": True, "images": []} for _ in lengths], "seed": 0}
    sha256 = hashlib.sha256(flat.tobytes() + starts.tobytes()).hexdigest()
    held_out = np.ones(len(lengths), dtype=np.bool_)
    samples = SampleSet(Path("the given tokens"), document, (), sha256, held_out, flat, starts)
    return Windows(samples, tuple(range(len(lengths))), definition)


def text_windows(tokenizer: Any, text: str, window_tokens: int, max_tokens: int | None = None) -> Windows:
    """Cut a text into windows as `step128-eval ppl` does, so that the numbers compare.

    Args:
        tokenizer: transformers' tokenizer of the checkpoint.
        text: tokenized once, without special tokens.
        window_tokens: of a window, its BOS (if the tokenizer has one) included.
        max_tokens: of all windows together; None for the whole text. One window is taken in any case.

    Raises:
        ConfigurationError: the window is too short.
        CheckpointError: the text is too short.
    """
    bos = _bos(tokenizer)
    step = window_tokens - len(bos)
    if step < 2:
        raise ConfigurationError(f"a window of {window_tokens} tokens leaves nothing to score")
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)  # longer than the model's context: cut below
    if len(ids) + len(bos) < 2:
        raise CheckpointError(f"the text has {len(ids)} tokens, too few to score")
    starts = range(0, max(1, len(ids) - step + 1), step)
    count = len(starts) if max_tokens is None else max(1, max_tokens // window_tokens)
    chunks = [[*bos, *ids[start : start + step]] for start in starts[:count]]
    if bos:
        first = f"each window starts with the tokenizer's own BOS {bos} and every text token is scored"
    else:
        first = "the tokenizer has no BOS, so the first token of each window is not scored"
    return token_windows(
        chunks,
        f"text tokenized once, without special tokens; non-overlapping windows of {window_tokens} tokens in all "
        f"(stride {step}); {first}; a shorter window at the end is dropped unless it is the only one; exp of the mean "
        "over scored tokens",
    )


def sample_windows(samples: SampleSet, held_out: bool, max_tokens: int | None = None) -> Windows:
    """Take samples of a set, each one window: the held-out ones alone, or all.

    Args:
        samples: from :func:`open_samples`.
        held_out: only those that no statistic was taken from.
        max_tokens: no further sample once this many tokens are reached; of every part of the mixture in turn.

    Raises:
        CheckpointError: there is none.
    """
    candidates = [n for n in range(len(samples)) if samples.lengths[n] > 1 and (samples.held_out[n] or not held_out)]
    if not candidates:
        raise CheckpointError(f"{samples.folder}: no sample to score" + (" is held out" if held_out else ""))
    numbers: list[int] = []
    tokens = 0
    for number in _in_turn(samples, candidates):
        if max_tokens is not None and tokens >= max_tokens:
            break
        numbers.append(number)
        tokens += int(samples.lengths[number])
    kind = "held-out samples" if held_out else "samples (held out or not)"
    return Windows(
        samples,
        tuple(numbers),
        f"{len(numbers)} {kind} of the set {samples.sha256[:12]}, each by itself; its first token and the places of "
        "pictures are not scored; exp of the mean over scored tokens",
    )


def _in_turn(samples: SampleSet, numbers: Sequence[int]) -> list[int]:
    """Numbers with the parts of the mixture taking turns, so that a limit cuts all of them alike."""
    by_domain: dict[str, list[int]] = {}
    for number in numbers:
        by_domain.setdefault(samples.domain(number), []).append(number)
    rank = {number: (place, domain) for domain, row in by_domain.items() for place, number in enumerate(row)}
    return sorted(numbers, key=lambda number: rank[number])


def _bos(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself: usually one token, or none."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return list(full[:at])
