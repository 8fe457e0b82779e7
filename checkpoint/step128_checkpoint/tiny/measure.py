"""What a tiny model is worth, measured with the training code itself: perplexity, draft acceptance, KV ranges."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .network import TinyStep
from .ops import head_loss

WINDOW_TOKENS = 512  # perplexity is measured in windows of this length, the length of a training row
E4M3_MAX = 448.0
K_HEADROOM, V_HEADROOM = 1.15, 1.25  # over the largest value seen in calibration


@torch.no_grad()
def perplexity(network: TinyStep, token_ids: Tensor) -> float:
    """exp of the mean negative log-likelihood of int64 [n] tokens, in windows that do not see each other.

    Raises ValueError if there are not two tokens to predict one from the other.
    """
    if len(token_ids) < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, {len(token_ids)} given")
    total, count = 0.0, 0
    for at in range(0, len(token_ids) - 1, WINDOW_TOKENS):
        ids = token_ids[at : at + WINDOW_TOKENS + 1]
        hidden = network.trunk(network.embed(ids[None, :-1]))
        loss = head_loss(network.head_rows(hidden)[0], network.lm_head.weight, ids[1:])
        total, count = total + float(loss) * (len(ids) - 1), count + len(ids) - 1
    return math.exp(total / count)


def unigram_perplexity(train_ids: Tensor, token_ids: Tensor, vocab_size: int) -> float:
    """Perplexity of a model that only knows how often each token occurs in `train_ids` (counts plus one)."""
    counts = torch.bincount(train_ids, minlength=vocab_size).float() + 1
    return math.exp(-float((counts / counts.sum()).log()[token_ids].mean()))


@torch.no_grad()
def generate(network: TinyStep, prompt: Tensor, new_tokens: int) -> Tensor:
    """Greedy continuation of equally long prompts int64 [B, T], without a cache; returns [B, T + new_tokens]."""
    ids = prompt
    for _ in range(new_tokens):
        hidden = network.trunk(network.embed(ids))[:, -1]
        ids = torch.cat([ids, network.lm_head(network.head_rows(hidden)).argmax(-1, keepdim=True)], 1)
    return ids


@torch.no_grad()
def draft_acceptance(network: TinyStep, prompt: Tensor, new_tokens: int) -> list[float]:
    """Share of drafts accepted at each position when the model continues `prompt` [B, T] greedily.

    As vLLM counts: a draft at position i counts as accepted only if those before it were.
    """
    start = prompt.shape[1]
    ids = generate(network, prompt, new_tokens)
    embedded = network.embed(ids)
    hidden = network.trunk(embedded)
    states = network.draft_hidden(hidden[:, :-1], embedded[:, 1:])
    guesses = [layer.head(s) for layer, s in zip(network.mtp_layers, states, strict=True)]
    # Row j of layer k predicts token j + 2. A draft from base position t uses row t + k of layer k.
    last = ids.shape[1] - 2 - len(guesses)
    accepted, shares = torch.ones(ids.shape[0], last - start + 1, dtype=torch.bool), []
    for k, guess in enumerate(guesses):
        right = guess.argmax(-1)[:, start + k : last + k + 1] == ids[:, start + k + 2 : last + k + 3]
        accepted &= right
        shares.append(float(accepted.float().mean()))
    return shares


@torch.no_grad()
def kv_scales(network: TinyStep, ids: Tensor) -> dict[str, Tensor]:
    """FP8 (e4m3) scales of every layer's KV cache, float32 [1], by tensor name, from calibration rows int64 [B, T].

    scale = largest absolute value * headroom / 448; keys after norm and RoPE, as they are cached.
    """
    largest: dict[tuple[int, str], float] = {}

    def observe(layer: int, k: Tensor, v: Tensor) -> None:
        for kind, tensor in (("k", k), ("v", v)):
            largest[layer, kind] = max(largest.get((layer, kind), 0.0), float(tensor.abs().max()))

    for layer in network.layers:
        layer.self_attn.kv_observer = observe
    embedded = network.embed(ids)
    hidden = network.trunk(embedded)
    network.draft_hidden(hidden[:, :-1], embedded[:, 1:])
    for layer in network.layers:
        layer.self_attn.kv_observer = None
    headroom = {"k": K_HEADROOM, "v": V_HEADROOM}
    return {
        f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale": torch.tensor([peak * headroom[kind] / E4M3_MAX])
        for (layer, kind), peak in sorted(largest.items())
    }
