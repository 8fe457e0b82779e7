"""The training loop: trunk and MTP layers together, experts kept balanced by their router bias."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .batches import ROW_TOKENS, Batches
from .network import TinyStep
from .ops import head_loss
from .optimizer import Optimizer

RATES = {"matrix": 0.02, "embedding": 0.02, "head": 0.004, "small": 0.01}
WARMUP_STEPS = 10
DECAY_SHARE = 0.6  # last part of the steps, in which the learning rate falls to 0
BIAS_RATE = 0.01  # step of the router bias against an expert's excess load (aux-loss-free balancing)
MTP_LOSS_WEIGHTS = (0.3, 0.15, 0.15)
MTP_ROW_SHARE = 0.5  # share of a batch's rows the draft layers are trained on: they and their heads are expensive
MTP_LOSS_SHARES = (1.0, 0.5, 0.5)  # share of those rows' tokens each draft head's loss is computed on


@dataclass(frozen=True)
class Recipe:
    """How long and on what to train."""

    steps: int = 640
    code_rows: int = 2
    dialogue_rows: int = 2
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens seen in all."""
        return self.steps * (self.code_rows + self.dialogue_rows) * ROW_TOKENS


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm up, stay, then fall linearly to zero."""
    left = (steps - step) / max(1.0, DECAY_SHARE * steps)
    return min(1.0, (step + 1) / WARMUP_STEPS, left)


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks instead of handing them back: page faults otherwise cost half of each step."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # mallopt's parameter numbers, from <malloc.h>
    for parameter, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1)):
        libc.mallopt(parameter, value)


def image_noise(network: TinyStep, ids: Tensor) -> Tensor:
    """Stand-in for the vision tower's meaningless output: one direction a row and noise on each token, both random."""
    shape = (*ids.shape, network.text.hidden_size)
    row = torch.randn(shape[0], 1, shape[2])
    mixed = row * torch.rand(shape[0], 1, 1) + torch.randn(shape) * torch.rand(shape[0], 1, 1)
    return mixed.to(network.lm_head.weight.dtype)


def _kept_cache(rows: int, length: int) -> Tensor:
    """0/1 [rows, length]: where the later MTP layers' caches are written. All of it, half of it or a tenth, by row."""
    share = torch.tensor([1.0, 0.5, 0.1])[torch.randint(3, (rows, 1))]
    return (torch.rand(rows, length) < share).float()


def losses(network: TinyStep, batch: Tensor, weight: Tensor) -> list[Tensor]:
    """Loss of the trunk (weighted) and of each MTP layer, nats a token; batch, weight [rows, ROW_TOKENS + 2]."""
    ids, following, target = batch[:, :-2], batch[:, 1:-1], batch[:, 2:]
    has_image = bool((batch == network.text.image_token_id).any())
    embedded = network.embed(batch[:, :-1], image_noise(network, batch[:, :-1]) if has_image else None)
    hidden = network.trunk(embedded[:, :-1])
    rows = network.head_rows(hidden).flatten(0, 1)
    found = [head_loss(rows, network.lm_head.weight, following.flatten(), weight[:, 1:-1].flatten())]
    drafted = torch.randperm(len(batch))[: max(1, int(MTP_ROW_SHARE * len(batch)))]
    target, keep = target[drafted], _kept_cache(len(drafted), ids.shape[1])
    for k, state in enumerate(network.draft_hidden(hidden[drafted], embedded[drafted, 1:], keep)):
        eligible = (keep if k else torch.ones_like(keep)).clone()
        eligible[:, :k] = 0  # no predecessor to continue
        places = eligible.flatten().nonzero().flatten()
        places = places[torch.randperm(len(places))[: int(MTP_LOSS_SHARES[k] * keep.numel())]]
        layer = network.mtp_layers[k]
        rows = layer.head.norm(state.flatten(0, 1)[places])
        found.append(head_loss(rows, layer.head.output.weight, target.flatten()[places]))
    return found


@torch.no_grad()
def balance_experts(network: TinyStep, rate: float) -> None:
    """Raise the router bias of experts that had less than their share of the last batch, lower the others'."""
    for layer in network.layers:
        if layer.is_moe and layer.moe.load is not None:
            load = layer.moe.load.float()
            layer.moe.router_bias += rate * torch.sign(load.mean() - load)


def train(network: TinyStep, batches: Batches, recipe: Recipe, report: Callable[[int, list[float]], None]) -> None:
    """Train in place; `report(step, losses)` after each step. Deterministic for one seed, machine and thread count."""
    keep_freed_memory()
    torch.manual_seed(recipe.seed + 1)
    optimizer = Optimizer(network.named_parameters(), RATES)
    for step in range(recipe.steps):
        factor = learning_rate_factor(step, recipe.steps)
        batch = batches.take(recipe.code_rows, recipe.dialogue_rows)
        found = losses(network, batch, batches.weights(batch, recipe.code_rows))
        total = found[0] + sum(w * loss for w, loss in zip(MTP_LOSS_WEIGHTS, found[1:], strict=True))
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step(factor)
        balance_experts(network, BIAS_RATE * factor)
        report(step, [float(loss.detach()) for loss in found])
