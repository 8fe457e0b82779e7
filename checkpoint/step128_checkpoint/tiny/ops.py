"""The few operations of the tiny model that plain torch does too slowly on a CPU, each with its gradient by hand.

Attention works on blocks and never repeats the KV heads; experts are one batched matmul over token lists padded to the
longest; the loss never holds float32 logits of a whole batch. Together they are several times faster than SDPA with a
mask, a loop over experts, and `cross_entropy`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LOSS_CHUNK_TOKENS = 512  # 512 x 2048 float32 logits are 4 MiB: they stay in the cache


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention of grouped queries.

    q [B, T, G, R, D] with G KV heads and R queries a KV head; k, v [B, S, G, D]; allowed bool [T, S].
    Returns [B, T, G, R, D].
    """
    b, t, g, r, d = q.shape
    s = k.shape[1]
    queries = q.permute(0, 2, 3, 1, 4).reshape(b * g, r * t, d)
    keys = k.permute(0, 2, 3, 1).reshape(b * g, d, s)
    values = v.permute(0, 2, 1, 3).reshape(b * g, s, d)
    mask = torch.zeros(t, s, dtype=q.dtype).masked_fill_(~allowed, float("-inf")).repeat(r, 1)
    scores = torch.baddbmm(mask.unsqueeze(0), queries, keys, alpha=d**-0.5)
    out = torch.bmm(F.softmax(scores, dim=-1), values)
    return out.view(b, g, r, t, d).permute(0, 3, 1, 2, 4)


def _causal(length: int, window: int | None) -> Tensor:
    i = torch.arange(length)
    distance = i[:, None] - i[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention over whole sequences; with `window`, a token sees itself and the window-1 tokens before it.

    q [B, T, H, D]; k, v [B, T, G, D], H a multiple of G. Returns [B, T, H*D] of q's dtype.
    """
    b, t, h, d = q.shape
    g = k.shape[2]
    q = q.view(b, t, g, h // g, d)
    if window is None or t <= window or t % window:
        return _attend(q, k, v, _causal(t, window)).reshape(b, t, h * d)
    first = _attend(q[:, :window], k[:, :window], v[:, :window], _causal(window, None))
    blocks = t // window - 1
    later = q[:, window:].reshape(b * blocks, window, g, h // g, d)
    pairs = [x.unfold(1, 2 * window, window).permute(0, 1, 4, 2, 3).reshape(b * blocks, -1, g, d) for x in (k, v)]
    i = torch.arange(window)[:, None]
    j = torch.arange(2 * window)[None, :]
    out = _attend(later, pairs[0], pairs[1], (j > i) & (j <= i + window))
    return torch.cat([first, out.reshape(b, t - window, g, h // g, d)], 1).reshape(b, t, h * d)


class _Gather(torch.autograd.Function):
    """rows[token_of_slot] forwards; backwards a gather of `slot_of_token` and a sum (a scatter-add would be slower)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(slot_of_token)
        return F.pad(rows, (0, 0, 0, 1))[token_of_slot]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slot_of_token,) = ctx.saved_tensors
        return grad[slot_of_token].sum(1), None, None


class _Scatter(torch.autograd.Function):
    """The transpose of `_Gather`: each token's sum over its slots."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_slot)
        return slots[slot_of_token].sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (token_of_slot,) = ctx.saved_tensors
        return F.pad(grad, (0, 0, 0, 1))[token_of_slot], None, None


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) * scale in float32, keeping only x and 1/rms for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, inverse)
        out: Tensor = (wide * inverse).mul_(scale).to(x.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, inverse = ctx.saved_tensors
        unit = x * inverse  # float32, as inverse is
        wide = grad.float()
        product = wide * unit
        grad_scale = product.flatten(0, -1 - scale.ndim).sum(0)
        share = product.mul_(scale).mean(-1, keepdim=True)
        return wide.mul(scale).addcmul_(unit, share, value=-1).mul_(inverse).to(x.dtype), grad_scale, None


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / rms(x) * scale over the last dimension; x [..., *scale.shape], scale float32. Returns x's dtype."""
    out: Tensor = _RmsNorm.apply(x, scale, eps)  # type: ignore[no-untyped-call]
    return out


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(gate) * up; with a limit > 0, silu(gate) is clamped from above and `up` from both sides (Step-3.5)."""
    activated = F.silu(gate)
    if limit > 0:
        activated, up = activated.clamp(max=limit), up.clamp(-limit, limit)
    return activated * up


def routed_experts(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, choice: Tensor, weight: Tensor, limit: float
) -> tuple[Tensor, Tensor]:
    """Sum over each token's chosen experts of weight * expert(x).

    x [N, H]; gate, up [E, I, H]; down [E, H, I]; choice int64 [N, k]; weight float32 [N, k].
    Returns (out [N, H], tokens per expert int64 [E]).
    """
    experts, (n, k) = gate.shape[0], choice.shape
    flat = choice.reshape(-1)
    order = torch.argsort(flat, stable=True)
    load = torch.bincount(flat, minlength=experts)
    capacity = int(load.max())
    start = torch.cumsum(load, 0) - load
    slots = flat[order] * capacity + torch.arange(n * k) - start[flat[order]]
    token_of_slot = torch.full((experts * capacity,), n).index_put((slots,), order // k)
    slot_of_token = torch.empty(n * k, dtype=torch.long).index_put((order,), slots).view(n, k)
    slot_weight = torch.zeros(experts * capacity).index_put((slots,), weight.reshape(-1)[order])

    rows: Tensor = _Gather.apply(x, token_of_slot, slot_of_token)  # type: ignore[no-untyped-call]
    rows = rows.view(experts, capacity, -1)
    hidden = clamped_swiglu(torch.bmm(rows, gate.transpose(1, 2)), torch.bmm(rows, up.transpose(1, 2)), limit)
    hidden = hidden * slot_weight.view(experts, capacity, 1).to(hidden.dtype)
    out = torch.bmm(hidden, down.transpose(1, 2)).view(experts * capacity, -1)
    total: Tensor = _Scatter.apply(out, token_of_slot, slot_of_token)  # type: ignore[no-untyped-call]
    return total, load


class _HeadLoss(torch.autograd.Function):
    """Weighted mean cross-entropy of rows @ head.T; the gradients are made on the way, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, head: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        total = torch.zeros(())
        grad_rows, grad_head = torch.empty_like(rows), torch.zeros(head.shape)
        share = (weight / weight.sum())[:, None]
        for at in range(0, rows.shape[0], LOSS_CHUNK_TOKENS):
            part, goal, scale = (x[at : at + LOSS_CHUNK_TOKENS] for x in (rows, target, share))
            logp = F.log_softmax((part @ head.t()).float(), dim=-1)
            total -= (logp.gather(1, goal[:, None]) * scale).sum()
            probability = logp.exp_()
            probability.scatter_add_(1, goal[:, None], torch.full((len(goal), 1), -1.0))
            probability = probability.mul_(scale).to(rows.dtype)
            grad_rows[at : at + LOSS_CHUNK_TOKENS] = probability @ head
            grad_head += probability.t() @ part
        ctx.save_for_backward(grad_rows, grad_head.to(head.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_rows, grad_head = ctx.saved_tensors
        return grad_rows * grad, grad_head * grad, None, None


def head_loss(rows: Tensor, head: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood, nats a token: rows [N, H], head [V, H], target int64 [N]. Float32 scalar.

    `weight` float32 [N] makes it a weighted mean.
    """
    weight = torch.ones(len(target)) if weight is None else weight
    loss: Tensor = _HeadLoss.apply(rows, head, target, weight)  # type: ignore[no-untyped-call]
    return loss
