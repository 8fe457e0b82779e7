"""The MTP (draft) layers, chained over whole sequences as vLLM's proposer chains them over drafts.

Layer k drafts from the layer before it, one position later: its row j joins the embedding of token j + 1 with row j - 1
of layer k - 1 (row j of the trunk for the first layer). So its first k rows have no predecessor, and the last row of a
sequence no next token: these mean nothing, and no statistic counts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7DecoderLayer, Step3p7RMSNorm

from step128_checkpoint.calibration.batches import Batch
from step128_checkpoint.calibration.layers import load_layer, load_weight, run_layer
from step128_checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class DraftLayer:
    """One MTP layer without its output matrix; ``position`` is k, 0 for the first."""

    number: int
    position: int
    layer: Step3p7DecoderLayer
    embedding_norm: Step3p7RMSNorm
    hidden_norm: Step3p7RMSNorm
    join: Tensor
    head_norm: Step3p7RMSNorm

    def run(self, previous: Tensor, next_embeddings: Tensor, cache: Any = None) -> Tensor:
        """One step of the chain, ``[B, T, H]`` each: the layer's hidden states before the head's norm.

        Args:
            previous: the trunk's last hidden states (before the final norm), or the result of the layer before.
            next_embeddings: row j embeds token j + 1.
            cache: as in :func:`run_layer`.
        """
        if self.position:
            previous = F.pad(previous[:, :-1], (0, 0, 1, 0))
        joined = torch.cat([self.embedding_norm(next_embeddings), self.hidden_norm(previous)], dim=-1)
        return run_layer(self.layer, self.number, F.linear(joined, self.join), cache)

    def real(self, batch: Batch) -> Tensor:
        """Bool ``[B * T]`` on the CPU: the rows that mean something."""
        positions = torch.arange(batch.width)
        return ((positions >= self.position) & (positions < torch.tensor(batch.lengths)[:, None] - 1)).flatten()


def load_draft_layer(
    checkpoint: Checkpoint, config: Step3p7TextConfig, number: int, dtype: torch.dtype, device: torch.device | str
) -> DraftLayer:
    """Read one MTP layer; the checkpoint's files are open.

    Raises:
        CheckpointError: a weight is missing or misshapen.
    """
    prefix = f"model.layers.{number}."

    def norm(name: str) -> Step3p7RMSNorm:
        return load_norm(checkpoint, config, prefix + name, dtype, device)

    return DraftLayer(
        number,
        number - checkpoint.num_hidden_layers,
        load_layer(checkpoint, config, number, dtype, device),
        norm("enorm.weight"),
        norm("hnorm.weight"),
        load_weight(checkpoint, f"{prefix}eh_proj.weight", dtype, device),
        norm("transformer.shared_head.norm.weight"),
    )


def load_norm(
    checkpoint: Checkpoint, config: Step3p7TextConfig, name: str, dtype: torch.dtype, device: torch.device | str
) -> Step3p7RMSNorm:
    """Read one norm outside the decoder layers, by its weight's name."""
    with torch.device("meta"):
        norm = Step3p7RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    norm.load_state_dict({"weight": load_weight(checkpoint, name, dtype, device)}, assign=True)
    return norm.eval().requires_grad_(False)
