"""The report's section: a table, the definition, and what the mean hides."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from step128_evals.perplexity.summary import CARD_WORDS, KL_WORDS, interval_words
from step128_evals.perplexity.topk import unpack_floats
from step128_evals.runs import Item, Run
from step128_evals.stats import mean_interval

_BINS = 32


def markdown_section(run: Run, summary: dict[str, Any], pictures: Path) -> str:
    """See :meth:`Summary.markdown`."""
    items = sorted(run.with_status("measured"), key=lambda item: int(item.id))
    if not items:
        return f"Nothing was scored: 0 of {summary['chunks_planned']} chunks."
    rows = [
        ("perplexity", _figure(summary["perplexity"], 4) + interval_words(summary["perplexity_interval"])),
        ("nats a token", _figure(summary["nll_per_token"], 5) + interval_words(summary["nll_per_token_interval"])),
        ("scored tokens", f"{summary['scored_tokens']} in {summary['chunks']} of {summary['chunks_planned']} chunks"),
        ("text", f"`{summary['text']}`, SHA-256 `{summary['text_sha256'][:16]}`"),
        ("measured by", f"{summary['server']} at {summary['base_url']}"),
    ]
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        if name in summary:
            interval = interval_words(summary.get(f"{name}_interval"), ".5f")
            rows.append((name.replace("_", " "), _figure(summary[name], 5) + interval))
    kl = summary.get("kl")
    if kl:
        rows += [
            ("mean KL, nats (lower bound)", f"{kl['mean']:.4g}{interval_words(kl['mean_interval'], '.4g')}"),
            ("99th percentile of the KL", f"{kl['p99']:.4g}{interval_words(kl['p99_interval'], '.4g')}"),
            ("same likeliest token", f"{kl['same_top_token']:.2%} of {kl['positions']} positions"),
            ("reference", f"{kl['reference']['model']} at {kl['reference']['base_url']}, {kl['reference']['started']}"),
        ]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    lines += [
        f"Definition `{summary['definition_name']}`: {summary['definition']}. After {summary['definition_source']}. "
        f"Intervals: {summary['interval_method']}.",
        "",
        *([f"{KL_WORDS}.", ""] if kl else []),
        CARD_WORDS,
        "",
    ]
    _position_picture(items, pictures / "position.svg")
    lines.append("![Negative log-likelihood by position in the context](position.svg)")
    if kl:
        _kl_picture(items, kl["mean"], pictures / "kl.svg")
        lines.append("![Divergence from the reference](kl.svg)")
    return "\n".join(lines)


def _figure(value: float | None, digits: int) -> str:
    return "not said" if value is None else f"{value:.{digits}f}"


def _position_picture(items: list[Item], path: Path) -> None:
    """Mean and bootstrap band over chunks of the negative log-likelihood, in bins of positions."""
    from matplotlib.figure import Figure

    chunks = [(int(item.data["first_scored"]), unpack_floats(item.data["token_nll"])) for item in items]
    end = max(first + len(nll) for first, nll in chunks)
    edges = np.unique(np.linspace(0, end, min(_BINS, end) + 1).astype(int))
    middles, means, lows, highs = [], [], [], []
    for low, high in pairwise(edges.tolist()):
        parts = [nll[max(0, low - first) : max(0, high - first)] for first, nll in chunks]
        values = [float(part.mean()) for part in parts if len(part)]
        if values:
            interval = mean_interval(values)
            middles.append((low + high - 1) / 2)
            means.append(sum(values) / len(values))
            lows.append(interval.low if interval else means[-1])
            highs.append(interval.high if interval else means[-1])
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(middles, lows, highs, alpha=0.25, label="95 % over chunks")
    axes.plot(middles, means, marker=".", label=f"mean of {len(chunks)} chunks")
    axes.set(xlabel="position in the context (tokens)", ylabel="nats a token", xlim=(0, end))
    axes.legend()
    figure.savefig(path)


def _kl_picture(items: list[Item], mean: float, path: Path) -> None:
    """Histogram over positions, on a logarithmic scale: a few bad positions make the mean."""
    from matplotlib.figure import Figure

    values = np.concatenate([unpack_floats(item.data["kl"]["values"]) for item in items if "kl" in item.data])
    shown = np.maximum(values, 1e-8)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(shown, bins=np.logspace(-8, np.log10(max(0.1, shown.max())), 60).tolist())
    axes.axvline(max(mean, 1e-8), color="black", linestyle="--", label=f"mean {mean:.2g}")
    axes.set(xscale="log", yscale="log", xlabel="KL from the reference (nats; 1e-8: less)", ylabel="positions")
    axes.legend(loc="upper right")
    figure.savefig(path)
