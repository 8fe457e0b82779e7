"""The whole text network: embedding, trunk, output head, and the chain of MTP layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import TextSpec
from .model import Block, DecoderLayer, MtpLayer, RmsNorm, Weight, linear


class Layers(nn.Module):
    """Holds what the hub's names call `model.`: embedding, trunk and MTP layers, final norm."""

    def __init__(self, text: TextSpec) -> None:
        super().__init__()
        self.embed_tokens = Weight(text.vocab_size, text.hidden_size, std=1.0)
        self.layers = nn.ModuleList(MtpLayer(text, s) if s.is_mtp else DecoderLayer(text, s) for s in text.layers)
        self.norm = RmsNorm(text.hidden_size, text.norm_eps)


class TinyStep(Block):
    """Text part and MTP layers of Step-3.7. `state_dict()` has the hub's names (the vision tower is not part of it)."""

    def __init__(self, text: TextSpec) -> None:
        super().__init__()
        self.text = text
        self.model = Layers(text)
        self.lm_head = linear(text.hidden_size, text.vocab_size, gain=0.1)

    @property
    def layers(self) -> list[DecoderLayer]:
        """Trunk layers, then draft layers."""
        return [layer for layer in self.model.layers if isinstance(layer, DecoderLayer)]

    @property
    def mtp_layers(self) -> list[MtpLayer]:
        """The draft layers in drafting order."""
        return [layer for layer in self.model.layers if isinstance(layer, MtpLayer)]

    def embed(self, ids: Tensor, image_embedding: Tensor | None = None) -> Tensor:
        """Token embeddings [B, T, hidden]; where the id is the image placeholder, `image_embedding`'s row instead."""
        found = F.embedding(ids, self.model.embed_tokens.weight)
        if image_embedding is None:
            return found
        return torch.where((ids == self.text.image_token_id).unsqueeze(-1), image_embedding, found)

    def trunk(self, embeddings: Tensor) -> Tensor:
        """[B, T, hidden] embeddings -> last hidden state before the final norm, which is what the MTP layers get."""
        hidden = embeddings
        positions = torch.arange(hidden.shape[1])
        for layer in self.layers:
            if not isinstance(layer, MtpLayer):
                hidden = layer(hidden, positions)
        return hidden

    def head_rows(self, hidden: Tensor) -> Tensor:
        """The final norm: what lm_head is applied to."""
        return self.model.norm(hidden)

    def forward(self, ids: Tensor) -> Tensor:
        """Next-token logits [B, T, V] for ids int64 [B, T]."""
        return self.lm_head(self.head_rows(self.trunk(self.embed(ids))))

    def draft_hidden(self, hidden: Tensor, next_embedding: Tensor, kv_keep: Tensor | None = None) -> list[Tensor]:
        """Hidden states of all MTP layers, each [B, T, hidden], row j of each predicting token j+2.

        hidden [B, T, hidden] is the trunk's; next_embedding row j embeds token j+1. The chain is vLLM's proposer's:
        layer k runs one position later than layer k-1, so its row j continues row j-1 of the layer before. (The first
        k rows of layer k have no such predecessor and are meaningless.) `kv_keep` [B, T] applies to the layers after
        the first, whose caches that proposer writes only where it drafted.
        """
        states, previous = [], hidden
        for k, layer in enumerate(self.mtp_layers):
            if k:
                previous = F.pad(previous[:, :-1], (0, 0, 1, 0))
            previous = layer.draft(previous, next_embedding, kv_keep if k else None)
            states.append(previous)
        return states
