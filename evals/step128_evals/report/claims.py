"""What the model card claims, and what each claim does not say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """``open``: what one would have to know to repeat the figure."""

    eval: str
    text: str
    open: str


CLAIMS = (
    Claim("ppl", "perplexity 3.9352", "corpus, context length, stride, BOS"),
    Claim("needle", "code needle 100/100", "corpus, lengths, scoring; 100 of 100 still allows 3.7 % of failures"),
    Claim("tools", "0 failed tool calls", "of how many, of which kinds, at which depth"),
    Claim("acceptance", "MTP acceptance 0.92 / 0.75 / 0.55", "text, temperature, cumulative or conditional"),
    Claim("depth", "200k tokens of context", "at which speed"),
)
"""Card of Step-3.7-Flash-240REAP, as of 2026-11."""
