"""The figures of a ``ppl`` result file, with bootstrap intervals over chunks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from step128_evals.perplexity.topk import unpack_floats
from step128_evals.perplexity.windows import LM_EVAL
from step128_evals.perplexity.wording import SOURCES, describe
from step128_evals.runs import Item, Run
from step128_evals.stats import SEED, Interval, ratio_interval

KL_WORDS = (
    "KL(reference || this run) of the next token, in nats, from the tokens that both runs know (the likeliest of each "
    "and the text's own); all others are one bucket, so it is a lower bound of the KL over the whole vocabulary. "
    "The interval of the 99th percentile is from 100 to 1000 resamples of chunks, fewer for more positions"
)
CARD_WORDS = (
    "The 3.9352 on the model's card names no corpus, context length, stride or BOS, so nothing here confirms or "
    "refutes it."
)
_RESAMPLED_POSITIONS = 20_000_000
_MOST_NATS = 700.0  # beyond, exp overflows


def summarize(run: Run) -> dict[str, Any]:
    """Figures of the chunks that are there; ``complete`` says whether these are all."""
    settings = run.manifest.settings
    items = sorted(run.with_status("measured"), key=lambda item: int(item.id))
    nll = [float(item.data["nll"]) for item in items]
    positions = [int(item.data["positions"]) for item in items]
    scored = sum(positions)
    mean = math.fsum(nll) / scored if scored else None
    interval = ratio_interval(nll, positions) if scored else None
    summary: dict[str, Any] = {
        "perplexity": _exp(mean),
        "perplexity_interval": _exp_interval(interval),
        "nll_per_token": mean,
        "nll_per_token_interval": asdict(interval) if interval else None,
        "scored_tokens": scored,
        "definition_name": settings["definition"],
        "definition": describe(settings),
        "definition_source": SOURCES[settings["definition"]],
        "interval_method": "95 % percentile bootstrap over chunks, 10000 resamples, seed 42",
        "chunks": len(items),
        "chunks_planned": settings["chunks"],
        "complete": len(items) == settings["chunks"],
        "chunk_nll": nll,
        "chunk_positions": positions,
        "base_url": run.manifest.base_url,
        "server": run.manifest.endpoint.get("server"),
    }
    for name in ("text", "text_sha256", "documents", "text_tokens", "context_tokens", "stride_tokens", "bos_token_ids"):
        summary[name] = settings[name]
    for name in ("prefix_token_id", "dialect", "dtype"):
        if name in settings:
            summary[name] = settings[name]
    if settings["definition"] == LM_EVAL:
        summary |= _lm_eval(items, interval, mean)
    if "reference" in settings:
        summary |= _kl(items, settings["reference"])
    return summary


def _lm_eval(items: Sequence[Item], interval: Interval | None, mean: float | None) -> dict[str, Any]:
    """Word and byte figures of the documents that are there whole."""
    by_document = defaultdict(list)
    for item in items:
        by_document[item.data["document"]].append(item.data)
    whole = [chunks for chunks in by_document.values() if len(chunks) == chunks[0]["document_windows"]]
    nll = math.fsum(chunk["nll"] for chunks in whole for chunk in chunks)
    words = sum(chunks[0]["document_words"] for chunks in whole)
    size_bytes = sum(chunks[0]["document_bytes"] for chunks in whole)
    figures: dict[str, Any] = {"whole_documents": len(whole), "words": words, "bytes": size_bytes}
    for name, unit in (("word_perplexity", words), ("byte_perplexity", size_bytes)):
        figures[name] = _exp(nll / unit) if unit else None
        # Words and bytes are of documents, chunks are what is drawn: tokens a word are taken as fixed.
        scale = nll / unit / mean if unit and mean else None
        figures[f"{name}_interval"] = _exp_interval(interval, scale) if scale else None
    figures["bits_per_byte"] = nll / size_bytes / math.log(2) if size_bytes else None
    return figures


def _kl(items: Sequence[Item], reference: dict[str, Any]) -> dict[str, Any]:
    """``mean_kl`` stands at the top, where a model card looks for it."""
    compared = [item for item in items if "kl" in item.data]
    if not compared:
        return {"mean_kl": None, "kl": None}
    kl = [item.data["kl"] for item in compared]
    positions = [item.data["positions"] for item in compared]
    values = [unpack_floats(entry["values"]) for entry in kl]
    mean = ratio_interval([entry["sum"] for entry in kl], positions)
    same = ratio_interval([entry["same_top"] for entry in kl], positions)
    high = _quantile_interval(values, 0.99)
    total = sum(positions)
    figures = {
        "mean": math.fsum(entry["sum"] for entry in kl) / total,
        "mean_interval": asdict(mean) if mean else None,
        "p99": float(np.quantile(np.concatenate(values), 0.99)),
        "p99_interval": asdict(high) if high else None,
        "same_top_token": sum(entry["same_top"] for entry in kl) / total,
        "same_top_token_interval": asdict(same) if same else None,
        "known_probability": math.fsum(entry["kept"] for entry in kl) / total,
        "positions": total,
        "reference": reference,
    }
    return {"mean_kl": figures["mean"], "kl_definition": KL_WORDS, "kl": figures}


def _quantile_interval(chunks: Sequence[NDArray[np.float64]], share: float) -> Interval | None:
    """Bootstrap over chunks of a quantile of all their positions; fewer resamples the more positions there are."""
    if len(chunks) < 2:
        return None
    rng = np.random.default_rng(SEED)
    resamples = max(100, min(1000, _RESAMPLED_POSITIONS // sum(map(len, chunks))))
    found = [
        np.quantile(np.concatenate([chunks[n] for n in rng.integers(len(chunks), size=len(chunks))]), share)
        for _ in range(resamples)
    ]
    low, high = np.quantile(found, (0.025, 0.975))
    return Interval(float(low), float(high))


def _exp(nats: float | None) -> float | None:
    return math.exp(nats) if nats is not None and nats < _MOST_NATS else None


def _exp_interval(interval: Interval | None, scale: float = 1.0) -> dict[str, Any] | None:
    return {"low": _exp(interval.low * scale), "high": _exp(interval.high * scale)} if interval else None


def text(summary: dict[str, Any]) -> str:
    """For a terminal."""
    if not summary["scored_tokens"]:
        return f"nothing was scored yet: 0 of {summary['chunks_planned']} chunks"
    lines = []
    if summary["perplexity"] is None:
        lines.append(f"perplexity beyond exp({_MOST_NATS:g})")
    else:
        nats = f"({summary['nll_per_token']:.5f} nats a token)"
        lines.append(f"perplexity {summary['perplexity']:.4f} {nats}{interval_words(summary['perplexity_interval'])}")
    lines.append(
        f"{summary['scored_tokens']} scored tokens in {summary['chunks']} chunks of {summary['text']}, "
        f"by {summary['server']} at {summary['base_url']}"
    )
    if not summary["complete"]:
        lines.append(f"PARTIAL: {summary['chunks']} of {summary['chunks_planned']} chunks")
    if "bits_per_byte" in summary:
        lines += _lm_eval_lines(summary)
    if summary.get("kl"):
        lines += _kl_lines(summary["kl"])
        lines.append(KL_WORDS)
    lines.append(f"definition {summary['definition_name']}: {summary['definition']}")
    lines.append(f"  after {summary['definition_source']}; intervals: {summary['interval_method']}")
    lines.append(CARD_WORDS)
    return "\n".join(lines)


def headline(summary: dict[str, Any]) -> str:
    """One line for a table."""
    if summary["perplexity"] is None:
        return "nothing scored yet" if not summary["scored_tokens"] else f"perplexity beyond exp({_MOST_NATS:g})"
    figure = f"perplexity {summary['perplexity']:.4f}{interval_words(summary['perplexity_interval'])}"
    kl = summary.get("kl")
    return f"{figure}; mean KL {kl['mean']:.4g}{interval_words(kl['mean_interval'], '.4g')}" if kl else figure


def _lm_eval_lines(summary: dict[str, Any]) -> list[str]:
    if summary["word_perplexity"] is None or summary["byte_perplexity"] is None:
        return ["word and byte perplexity: no document is whole yet"]
    return [
        f"word perplexity {summary['word_perplexity']:.4f}{interval_words(summary['word_perplexity_interval'])}",
        f"byte perplexity {summary['byte_perplexity']:.5f}{interval_words(summary['byte_perplexity_interval'], '.5f')}",
        f"{summary['bits_per_byte']:.5f} bits a byte "
        f"({summary['words']} words, {summary['bytes']} bytes, {summary['whole_documents']} documents)",
    ]


def _kl_lines(kl: dict[str, Any]) -> list[str]:
    reference = kl["reference"]
    return [
        f"against {reference['model']} at {reference['base_url']} of {reference['started']}:",
        f"  mean KL {kl['mean']:.4g} nats{interval_words(kl['mean_interval'], '.4g')}",
        f"  99th percentile {kl['p99']:.4g}{interval_words(kl['p99_interval'], '.4g')}",
        f"  same likeliest token at {kl['same_top_token']:.2%} of {kl['positions']} positions"
        f"{interval_words(kl['same_top_token_interval'], '.2%')}",
        f"  the tokens that both know hold {kl['known_probability']:.2%} of the reference's probability",
    ]


def interval_words(interval: dict[str, Any] | None, form: str = ".4f") -> str:
    """``, 95 % from 1.0 to 2.0``; nothing without an interval."""
    if not interval or interval["low"] is None or interval["high"] is None:
        return ""
    return f", 95 % from {interval['low']:{form}} to {interval['high']:{form}}"


def markdown(run: Run, summary: dict[str, Any], pictures: Path) -> str:
    """A report's section."""
    from step128_evals.perplexity.pictures import markdown_section

    return markdown_section(run, summary, pictures)


def score(run: Run) -> dict[str, float]:
    """Mean negative log-likelihood (nats a token) of each chunk."""
    return {item.id: item.data["nll"] / item.data["positions"] for item in run.with_status("measured")}
