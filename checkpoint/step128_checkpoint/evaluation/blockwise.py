"""Perplexity, and divergence from a reference, with one layer of one model in memory at a time.

The hidden states of all windows are kept in the host's memory and go through the layers together, batch by batch. So a
400 GB model can be evaluated on one GPU, or on a CPU, for the price of reading it once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.step3p7.modeling_step3p7 import Step3p7RMSNorm

from step128_checkpoint.calibration.batches import Batch, plan_batches
from step128_checkpoint.calibration.embeddings import embed
from step128_checkpoint.calibration.layers import load_layer, load_weight, run_layer, text_config
from step128_checkpoint.errors import CheckpointError, ConfigurationError
from step128_checkpoint.evaluation.kv_cache import KvCache, fp8_cache
from step128_checkpoint.evaluation.windows import Windows
from step128_checkpoint.expected import structure_problems
from step128_checkpoint.reader import Checkpoint

_ROWS_AT_ONCE = 256  # of logits: 128896 of them each in float32, for two models, with what softmax needs

OnTokens = Callable[[int], None]


@dataclass(frozen=True)
class EvaluationOptions:
    """``kv_cache``: fp8 rounds K and V with the checkpoint's scales, fp8-unit with 1, bf16 leaves them as computed.

    ``dtype`` is that of weights and computation; log-probabilities are float32 in any case. ``batch_tokens`` go through
    a layer at once.
    """

    kv_cache: KvCache = "bf16"
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_tokens: int = 8192


@dataclass(frozen=True)
class Evaluation:
    """Of one checkpoint on windows: summed negative log-likelihood (nats) and scored tokens of each, in their order."""

    window_nll: tuple[float, ...]
    window_scored: tuple[int, ...]
    seconds: float

    @property
    def scored_tokens(self) -> int:
        """Scored tokens of all windows."""
        return sum(self.window_scored)

    @property
    def nll_per_token(self) -> float:
        """Mean negative log-likelihood of the scored tokens, in nats."""
        return math.fsum(self.window_nll) / self.scored_tokens

    @property
    def perplexity(self) -> float:
        """exp of :attr:`nll_per_token`; infinite where a float cannot hold it."""
        return math.exp(self.nll_per_token) if self.nll_per_token < 700 else math.inf


@dataclass(frozen=True)
class Comparison:
    """Of a candidate against the reference on the same windows.

    ``window_kl`` sums KL(reference || candidate) in nats over the scored positions of each window, ``window_agreeing``
    counts those where both find the same token likeliest.
    """

    evaluation: Evaluation
    window_kl: tuple[float, ...]
    window_agreeing: tuple[int, ...]

    @property
    def mean_kl(self) -> float:
        """KL(reference || candidate) of the next token's distribution, in nats, mean over the scored positions."""
        return math.fsum(self.window_kl) / self.evaluation.scored_tokens

    @property
    def top1_agreement(self) -> float:
        """Share of the scored positions where both find the same token likeliest."""
        return sum(self.window_agreeing) / self.evaluation.scored_tokens


@dataclass(frozen=True)
class Subject:
    """A checkpoint and how it is evaluated."""

    checkpoint: Checkpoint
    options: EvaluationOptions = field(default_factory=EvaluationOptions)


def evaluate(
    checkpoint: Checkpoint, windows: Windows, options: EvaluationOptions, on_tokens: OnTokens = lambda tokens: None
) -> Evaluation:
    """Perplexity of a checkpoint, plain or NL4, on windows.

    Args:
        checkpoint: opened; its files are opened and closed here.
        windows: see :mod:`windows`.
        options: how.
        on_tokens: called with the tokens that went through a layer since the last call (see :func:`work_tokens`).

    Raises:
        CheckpointError: the checkpoint is bad, lacks KV scales that were asked for, or gives NaN.
    """
    evaluation, _ = _evaluate(Subject(checkpoint, options), windows, on_tokens)
    return evaluation


def compare(
    reference: Subject, candidates: Sequence[Subject], windows: Windows, on_tokens: OnTokens = lambda tokens: None
) -> tuple[Evaluation, list[Comparison]]:
    """Evaluate a reference, and candidates against it, on the same windows.

    Raises:
        CheckpointError: as :func:`evaluate` does.
        ConfigurationError: the vocabularies differ.
    """
    found, states = _evaluate(reference, windows, on_tokens)
    comparisons = []
    for candidate in candidates:
        evaluation, others = _evaluate(candidate, windows, on_tokens)
        comparisons.append(_compare(reference, states, candidate, others, windows, evaluation))
    return found, comparisons


def work_tokens(checkpoint: Checkpoint, windows: Windows) -> int:
    """Tokens that go through layers in one evaluation: the total of what ``on_tokens`` is told."""
    return windows.tokens * checkpoint.num_hidden_layers


def final_states(subject: Subject, windows: Windows, on_tokens: OnTokens = lambda tokens: None) -> dict[int, Tensor]:
    """States [T, H] after the last norm, on the CPU, by window number; what the output head is applied to.

    Raises:
        CheckpointError: as :func:`evaluate` does.
    """
    checkpoint, options = subject.checkpoint, subject.options
    if problems := structure_problems(checkpoint):
        raise CheckpointError(problems[0])
    config = text_config(checkpoint)
    batches = plan_batches(windows.samples.lengths.tolist(), windows.numbers, True, options.batch_tokens)
    numbers = [number for batch in batches for number in batch.numbers]
    with checkpoint:
        embedded = embed(checkpoint, windows.samples, numbers, options.device, options.dtype)
        states = [torch.cat([next(embedded)[1].cpu() for _ in batch.numbers]) for batch in batches]
        cache = fp8_cache(checkpoint, options.kv_cache)
        for number in range(checkpoint.num_hidden_layers):
            layer = load_layer(checkpoint, config, number, options.dtype, options.device)
            for i, batch in enumerate(batches):
                hidden = batch.pad(states[i].to(options.device))
                states[i] = batch.unpad(run_layer(layer, number, hidden, cache)).cpu()
                on_tokens(batch.tokens)
            del layer  # before the next one is loaded: one layer in memory
        norm = Step3p7RMSNorm(config.hidden_size, config.rms_norm_eps)
        norm.weight = nn.Parameter(load_weight(checkpoint, "model.norm.weight", options.dtype, "cpu"), False)
        found: dict[int, Tensor] = {}
        for batch, rows in zip(batches, states, strict=True):
            found |= _by_number(batch, norm(rows))
    return found


def _by_number(batch: Batch, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    return zip(batch.numbers, torch.split(rows, list(batch.lengths)), strict=True)


def _evaluate(subject: Subject, windows: Windows, on_tokens: OnTokens) -> tuple[Evaluation, dict[int, Tensor]]:
    started = time.monotonic()
    states = final_states(subject, windows, on_tokens)
    head = _head(subject)
    nll, scored = [], []
    for number in windows.numbers:
        rows, targets = _scored(states[number], windows, number, subject.checkpoint)
        parts = [
            F.cross_entropy(_logits(head, part), wanted.to(head.device), reduction="sum").double()
            for part, wanted in zip(_pieces(rows), _pieces(targets), strict=True)
        ]
        nll.append(float(torch.stack(parts).sum()) if len(targets) else 0.0)
        scored.append(len(targets))
    if not all(map(math.isfinite, nll)):
        raise CheckpointError(f"{subject.checkpoint.folder}: the model gives NaN. Run `verify` on the checkpoint.")
    if not sum(scored):
        raise ConfigurationError("nothing to score: the windows hold no token after their first but pictures")
    return Evaluation(tuple(nll), tuple(scored), time.monotonic() - started), states


def _compare(
    reference: Subject,
    states: dict[int, Tensor],
    candidate: Subject,
    others: dict[int, Tensor],
    windows: Windows,
    evaluation: Evaluation,
) -> Comparison:
    head, other_head = _head(reference), _head(candidate)
    if head.shape[0] != other_head.shape[0]:
        raise ConfigurationError(
            f"the vocabularies differ: {head.shape[0]} tokens in {reference.checkpoint.folder}, {other_head.shape[0]} "
            f"in {candidate.checkpoint.folder}"
        )
    divergence, agreeing = [], []
    for number in windows.numbers:
        rows, _ = _scored(states[number], windows, number, reference.checkpoint)
        other_rows, _ = _scored(others[number], windows, number, reference.checkpoint)
        kl, same = 0.0, 0
        for part, other in zip(_pieces(rows), _pieces(other_rows), strict=True):
            expected = _logits(head, part).log_softmax(-1)
            found = _logits(other_head, other).log_softmax(-1).to(expected.device)
            kl += float((expected.exp() * (expected - found)).sum(-1).double().sum())
            same += int((expected.argmax(-1) == found.argmax(-1)).sum())
        divergence.append(kl)
        agreeing.append(same)
    return Comparison(evaluation, tuple(divergence), tuple(agreeing))


def _scored(states: Tensor, windows: Windows, number: int, checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """Rows of the positions that are scored, and the tokens that come next there."""
    image_token_id = checkpoint.config.get("image_token_id")
    targets, scored = windows.targets(number, image_token_id if isinstance(image_token_id, int) else None)
    return states[:-1][scored], targets[scored]


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows, _ROWS_AT_ONCE)


def _head(subject: Subject) -> Tensor:
    with subject.checkpoint as checkpoint:
        return load_weight(checkpoint, "lm_head.weight", subject.options.dtype, subject.options.device)


def _logits(head: Tensor, rows: Tensor) -> Tensor:
    """Float32 logits [rows, V], computed in the model's type as the model does."""
    return F.linear(rows.to(head.device), head).float()
