"""Made-up batches over a paged cache, and the attention launches carried out on them in Triton's interpreter."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from gluon_interpreter import interpreted
from triton.experimental.gluon._runtime import GluonJITFunction

from step128_kernels.attention.launches import decode_launches, prefill_launches
from step128_kernels.attention.page_order import write_tokens
from step128_kernels.attention.reference import paged_attention_reference
from step128_kernels.attention.shape import AttentionCall, AttentionShape
from step128_kernels.launch import Launch
from step128_kernels.run_launch import run

_log = logging.getLogger(__name__)

NAN_BYTE = 0x7F
PREFILL = {"phase": "prefill", "BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
KINDS = [("rdna4", True), ("rdna3", True), ("portable", False)]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Batch:
    """One layer's inputs; ``key`` and ``value`` are what the cache holds, by sequence, ``[context, kv_heads, D]``."""

    shape: AttentionShape
    query: torch.Tensor
    cache: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    key: list[torch.Tensor]
    value: list[torch.Tensor]
    k_scale: torch.Tensor
    v_scale: torch.Tensor

    @property
    def scale(self) -> float:
        return float(self.shape.head_dim**-0.5)


def made_up(shape: AttentionShape, sequences: list[tuple[int, int]], seed: int = 0, spread: float = 1.0) -> Batch:
    """Sequences of (query tokens, context), pages in random order, whatever no query may see poisoned with NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * spread

    dtype, page = DTYPES[shape.element], shape.page
    pages = [-(-context // page) for _, context in sequences]
    blocks = torch.randperm(sum(pages) + 3, generator=generator)
    table = torch.full((len(sequences), max(pages) + 2), 10**6, dtype=torch.int32)  # beyond its pages nobody may look
    fp8 = shape.kv_dtype == "fp8"
    raw = torch.full(
        (len(blocks), shape.kv_heads, page, 2 * shape.head_dim * (1 if fp8 else 2)), NAN_BYTE, dtype=torch.uint8
    )
    if not fp8:
        raw[..., 1::2] = 0x7F
        raw[..., 0::2] = 0xFF
    cache = raw.view(torch.float8_e4m3fn if fp8 else dtype)
    k_scale, v_scale = torch.tensor(0.0123), torch.tensor(0.031)
    keys, values, used = [], [], 0
    for i, (tokens, context) in enumerate(sequences):
        mine = blocks[used : used + pages[i]]
        used += pages[i]
        table[i, : pages[i]] = mine.int()
        key, value = normal(context, shape.kv_heads, shape.head_dim), normal(context, shape.kv_heads, shape.head_dim)
        if fp8:
            key, value = (key / k_scale).to(cache.dtype), (value / v_scale).to(cache.dtype)
        else:
            key, value = key.to(dtype), value.to(dtype)
        first = max(0, context - tokens - shape.window + 1) if shape.window else 0
        token = torch.arange(first, context)  # what is before every query's window may have been given away
        write_tokens(cache, mine[token // page] * page + token % page, key[first:], value[first:])
        keys.append(key.float() * k_scale if fp8 else key.float())
        values.append(value.float() * v_scale if fp8 else value.float())
    starts = torch.tensor([0, *torch.tensor([tokens for tokens, _ in sequences]).cumsum(0).tolist()], dtype=torch.int32)
    return Batch(
        shape,
        normal(int(starts[-1]), shape.heads, shape.head_dim).to(dtype),
        cache,
        table,
        torch.tensor([context for _, context in sequences], dtype=torch.int32),
        starts,
        keys,
        values,
        k_scale,
        v_scale,
    )


def expected(batch: Batch) -> torch.Tensor:
    """The reference's float32 result; NaN where no sequence has a row."""
    out = torch.full_like(batch.query, float("nan"), dtype=torch.float32)
    paged_attention_reference(
        batch.query, batch.cache, batch.table, batch.lengths, batch.starts, scale=batch.scale,
        window=batch.shape.window, k_scale=batch.k_scale, v_scale=batch.v_scale, out=out,
    )  # fmt: skip
    return out


def bf16_path(batch: Batch) -> torch.Tensor:
    """What attention gives that rounds K, V and probabilities to bfloat16 and sums in float32, as vLLM's kernels do."""
    out = torch.full_like(batch.query, float("nan"), dtype=torch.float32)
    ratio, window = batch.shape.gqa_ratio, batch.shape.window
    for i, context in enumerate(batch.lengths.tolist()):
        start, end = batch.starts[i : i + 2].tolist()
        key, value = (
            x[i].bfloat16().float().transpose(0, 1).repeat_interleave(ratio, 0) for x in (batch.key, batch.value)
        )
        q = batch.query[start:end].bfloat16().float().transpose(0, 1)
        position, number = torch.arange(context - (end - start), context), torch.arange(context)
        sees = number[None] <= position[:, None]
        if window:
            sees &= number[None] > position[:, None] - window
        scores = (q @ key.transpose(1, 2) * batch.scale).masked_fill(~sees, float("-inf"))
        weight = (scores - scores.amax(-1, keepdim=True)).exp()
        result = weight.bfloat16().float() @ value / weight.sum(-1, keepdim=True)
        out[start:end] = result.bfloat16().float().transpose(0, 1)
    return out


def launched(batch: Batch, config: dict[str, Any], prefill: dict[str, Any], target: str, gluon: bool) -> torch.Tensor:
    """Carry out what a call launches; everything that it writes starts as NaN.

    ``gluon``: the kernels for RDNA from their own source, with their assembly; else the portable twin.
    """
    shape = batch.shape
    tokens = int((batch.starts[1:] - batch.starts[:-1]).max())
    call = AttentionCall(shape, len(batch.lengths), tokens, int(batch.lengths.max()))
    kind = target if gluon else "portable"
    launches = decode_launches(call, config, kind)
    if tokens > 8:
        launches += prefill_launches(call, prefill, kind)
    out = torch.full_like(batch.query, float("nan"))
    rows = len(batch.lengths) * min(tokens, 8) * shape.heads * config["SPLITS"]
    tensors = {
        "query_ptr": batch.query.view(torch.int32) if shape.kv_dtype == "fp8" else batch.query,
        "cache_ptr": batch.cache.view(torch.int16) if shape.kv_dtype == "fp8" else batch.cache,
        "table_ptr": batch.table,
        "lengths_ptr": batch.lengths,
        "starts_ptr": batch.starts,
        "k_scale_ptr": batch.k_scale,
        "v_scale_ptr": batch.v_scale,
        "out_ptr": out,
        "partial_ptr": torch.full((rows * shape.head_dim,), float("nan")),
        "mass_ptr": torch.full((rows,), float("nan")),
    }
    for launch in launches:
        mine = replace(
            launch,
            function=interpreted(launch.function) if isinstance(launch.function, GluonJITFunction) else launch.function,
            scalars={**launch.scalars, "table_stride": batch.table.stride(0)}
            if "scale" in launch.scalars
            else launch.scalars,
        )
        assert isinstance(mine, Launch)
        run(mine, {name: tensors[name] for name in launch.pointers})
    return out


def decode(splits: int, block_n: int = 32, least_tiles: int = 1) -> dict:
    return {"phase": "decode", "BLOCK_N": block_n, "SPLITS": splits, "LEAST_TILES": least_tiles, "num_warps": 1}


def layer(ratio: int = 8, window: int = 0, page: int = 16, kv: str = "fp8", head_dim: int = 64, kv_heads: int = 1):
    return AttentionShape(ratio * kv_heads, kv_heads, head_dim, window, page, kv, "fp16" if kv == "fp16" else "bf16")


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the error over that of the result."""
    return float((found.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def check(batch: Batch, splits: int, target: str, gluon: bool, block_n: int = 32) -> None:
    """:func:`check_result` of the launches with ``splits`` and ``block_n``."""
    check_result(batch, launched(batch, decode(splits, block_n), PREFILL, target, gluon), target)


def check_result(batch: Batch, found: torch.Tensor, target: str) -> None:
    """No NaN gets in, every row is written, and the error is below that of rounding K, V and P to bfloat16."""
    wanted = expected(batch)
    assert not wanted.isnan().any()
    assert not found.isnan().any()
    mine, usual = error(found, wanted), error(bf16_path(batch), wanted)
    _log.warning("%s %s: error %.2e, bfloat16 path %.2e", batch.shape, target, mine, usual)
    assert mine <= usual
    # No row is off: a wrong key or mask moves a row by far more than rounding to bfloat16 does.
    worst = (found.float() - wanted).abs().amax(-1) / wanted.square().mean(-1).sqrt()
    assert worst.max() < 0.05, worst
