"""Step-3.7's decoder and MTP layers in plain torch, with the hub's parameter names: the state dict is the checkpoint.

Written for whole sequences (training, perplexity, calibration), not for decoding. Numerics follow the released model:
zero-centred RMSNorm, q/k norm before RoPE, head-wise sigmoid gate on the attention output, sigmoid router whose bias
takes part in the choice only. Its float32 logits are compared with transformers' own implementation in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import LayerSpec, TextSpec
from .ops import attention, clamped_swiglu, rms_norm, routed_experts

KvObserver = Callable[[int, Tensor, Tensor], None]


class Block(nn.Module):
    """A module from tensors to one tensor."""

    __call__: Callable[..., Tensor]


class Weight(Block):
    """A parameter called `weight`, so that names come out as in the hub's checkpoint."""

    def __init__(self, *shape: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape) * std)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] @ weight [N, K].T -> [..., N]."""
        return F.linear(x, self.weight)


def linear(inputs: int, outputs: int, gain: float = 1.0) -> Weight:
    """A bias-free projection [outputs, inputs] that keeps the variance, times `gain`."""
    return Weight(outputs, inputs, std=gain / math.sqrt(inputs))


class RmsNorm(Block):
    """x / rms(x) * (1 + weight), computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension; returns x's dtype."""
        return rms_norm(x, 1.0 + self.weight.float(), self.eps)


def rope_tables(layer: LayerSpec, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [T, rotary_dim]; frequencies scaled as Llama 3 does where the layer asks for it."""
    inverse = 1.0 / layer.rope_theta ** (torch.arange(0, layer.rotary_dim, 2).float() / layer.rotary_dim)
    if layer.rope_scaling:
        scaling = layer.rope_scaling
        turns = scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # 1: fast rotation, kept; 0: slow, divided by the factor
        inverse = inverse * keep + inverse / scaling["factor"] * (1 - keep)
    angle = positions.float()[:, None] * inverse
    return torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neox-style rotation of the first rotary_dim channels. x [B, T, H, D]; cos, sin [T, rotary_dim]."""
    size = cos.shape[-1]
    turned, passed = x[..., :size], x[..., size:]
    left, right = turned.chunk(2, -1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    turned = turned * cos + torch.cat([-right, left], -1) * sin
    return torch.cat([turned, passed], -1) if passed.shape[-1] else turned


class Attention(Block):
    """Grouped-query attention with q/k norm, partial RoPE and one sigmoid gate a head."""

    def __init__(self, text: TextSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.layer, self.text = layer, text
        size, kv = layer.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
        self.q_proj, self.k_proj = linear(text.hidden_size, size), linear(text.hidden_size, kv)
        self.v_proj, self.o_proj = linear(text.hidden_size, kv), linear(size, text.hidden_size, gain=0.1)
        self.g_proj = linear(text.hidden_size, layer.num_heads, gain=0.1)
        self.q_norm, self.k_norm = RmsNorm(text.head_dim, text.norm_eps), RmsNorm(text.head_dim, text.norm_eps)
        self.kv_observer: KvObserver | None = None

    def forward(self, x: Tensor, positions: Tensor, kv_keep: Tensor | None = None) -> Tensor:
        """x [B, T, hidden] -> same. `kv_keep` [B, T] 0/1 erases keys and values, as a cache never written there has."""
        heads, groups, dim = self.layer.num_heads, self.text.num_kv_heads, self.text.head_dim
        projections = [self.q_proj, self.k_proj, self.v_proj, self.g_proj]
        joined = F.linear(x, torch.cat([p.weight for p in projections]))
        q, k, v, gate = torch.split(joined, [heads * dim, groups * dim, groups * dim, heads], dim=-1)
        qk = torch.cat([q, k], -1).view(*x.shape[:2], heads + groups, dim)
        scale = torch.cat([self.q_norm.weight.expand(heads, -1), self.k_norm.weight.expand(groups, -1)])
        qk = _rotate(rms_norm(qk, 1.0 + scale.float(), self.text.norm_eps), *rope_tables(self.layer, positions))
        q, k = torch.split(qk, [heads, groups], dim=2)
        v = v.view(*x.shape[:2], groups, dim)
        if self.kv_observer is not None:
            self.kv_observer(self.layer.index, k, v)
        if kv_keep is not None:
            k, v = k * kv_keep[..., None, None].to(k.dtype), v * kv_keep[..., None, None].to(v.dtype)
        out = attention(q, k, v, self.text.window_tokens if self.layer.sliding else None)
        out = out.view(*x.shape[:2], heads, dim) * torch.sigmoid(gate).unsqueeze(-1)
        return self.o_proj(out.reshape(*x.shape[:2], heads * dim))


class Mlp(Block):
    """SwiGLU, with the layer's clamp."""

    def __init__(self, hidden: int, inner: int, limit: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, inner), linear(hidden, inner)
        self.down_proj = linear(inner, hidden, gain=0.1)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> same."""
        return self.down_proj(clamped_swiglu(self.gate_proj(x), self.up_proj(x), self.limit))


class Moe(Block):
    """Sigmoid-routed experts; `router_bias` only steers the choice, and the training loop moves it, not a gradient."""

    router_bias: Tensor

    def __init__(self, text: TextSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.text, self.layer = text, layer
        inner, hidden, experts = text.expert_dim, text.hidden_size, text.num_experts
        self.gate = linear(hidden, experts)
        self.register_buffer("router_bias", torch.zeros(experts))
        self.gate_proj = Weight(experts, inner, hidden, std=hidden**-0.5)
        self.up_proj = Weight(experts, inner, hidden, std=hidden**-0.5)
        self.down_proj = Weight(experts, hidden, inner, std=0.1 * inner**-0.5)
        self.load: Tensor | None = None  # tokens per expert of the last forward pass, int64 [E]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, hidden] -> same (without the shared expert)."""
        rows = x.reshape(-1, x.shape[-1])
        score = torch.sigmoid(F.linear(rows.float(), self.gate.weight.float()))
        choice = torch.topk(score.detach() + self.router_bias, self.text.experts_per_token, dim=-1).indices
        weight = score.gather(1, choice)
        weight = weight / weight.sum(-1, keepdim=True) * self.text.router_scale
        out, self.load = routed_experts(
            rows,
            self.gate_proj.weight,
            self.up_proj.weight,
            self.down_proj.weight,
            choice,
            weight,
            self.layer.routed_limit,
        )
        return out.view_as(x)


class DecoderLayer(Block):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, text: TextSpec, layer: LayerSpec) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(text.hidden_size, text.norm_eps)
        self.post_attention_layernorm = RmsNorm(text.hidden_size, text.norm_eps)
        self.self_attn = Attention(text, layer)
        self.is_moe = layer.is_moe
        if layer.is_moe:
            self.moe = Moe(text, layer)
            self.share_expert = Mlp(text.hidden_size, text.shared_dim, layer.shared_limit)
        else:
            self.mlp = Mlp(text.hidden_size, text.intermediate_size, layer.shared_limit)

    def forward(self, x: Tensor, positions: Tensor, kv_keep: Tensor | None = None) -> Tensor:
        """x [B, T, hidden] -> same."""
        x = x + self.self_attn(self.input_layernorm(x), positions, kv_keep)
        normed = self.post_attention_layernorm(x)
        return x + (self.moe(normed) + self.share_expert(normed) if self.is_moe else self.mlp(normed))


class SharedHead(Block):
    """Norm and output matrix of one MTP layer."""

    def __init__(self, text: TextSpec) -> None:
        super().__init__()
        self.norm = RmsNorm(text.hidden_size, text.norm_eps)
        self.output = linear(text.hidden_size, text.vocab_size, gain=0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., hidden] -> logits [..., V]."""
        return self.output(self.norm(hidden))


class MtpLayer(DecoderLayer):
    """A draft layer: joins the next token's embedding with the previous hidden state, and has an own output head."""

    def __init__(self, text: TextSpec, layer: LayerSpec) -> None:
        super().__init__(text, layer)
        self.enorm, self.hnorm = (RmsNorm(text.hidden_size, text.norm_eps) for _ in range(2))
        self.eh_proj = linear(2 * text.hidden_size, text.hidden_size)
        self.transformer = nn.Module()
        self.transformer.shared_head = SharedHead(text)

    def draft(self, previous: Tensor, next_embedding: Tensor, kv_keep: Tensor | None = None) -> Tensor:
        """One draft step for a whole sequence; both inputs and the result [B, T, hidden], all before the head's norm.

        The order (embedding, hidden) and the pre-norm hidden state are those of vLLM's Step3p5MTP.
        """
        joined = torch.cat([self.enorm(next_embedding), self.hnorm(previous)], -1)
        return self(self.eh_proj(joined), torch.arange(previous.shape[1]), kv_keep)

    @property
    def head(self) -> SharedHead:
        """The draft layer's own output head ("shared" is the hub's name for it)."""
        head: SharedHead = self.transformer.shared_head  # type: ignore[assignment]
        return head
