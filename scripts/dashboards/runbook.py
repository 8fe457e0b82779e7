"""docs/runbook.md as a dashboard, so that what to do is one click away from what is wrong."""

from __future__ import annotations

import re

from layout import Band, dashboard, runbook_sections
from panels import Json, text


def build() -> Json:
    """Return the dashboard: one panel of text for each alert; links name a panel by its place."""
    bands = [Band(_height(words, 24), ((24, text(name, _said(name), words)),)) for name, words in _sections()]
    return dashboard(
        "runbook", "runbook", "What each alert means and what to do about it: docs/runbook.md, panel by panel.", bands
    )


def _sections() -> list[tuple[str, str]]:
    return [(name, re.sub(r"\]\((?!http)[^)]*\)", "]", words)) for name, words in runbook_sections()]


def _said(name: str) -> str:
    return f"The section {name} of docs/runbook.md, made from it by `python scripts/dashboards`."


def _height(words: str, columns: int) -> int:
    """Return rows of 38 pixels that the text needs at most: lines of 24 pixels, about 8 characters a column."""
    paragraphs = re.split(r"\n\s*\n|\n(?=\d\. |- |\|)", words)
    lines = sum(1 + len(part) // (8 * columns) for part in paragraphs) + words.count("\n\n")
    return max(3, round(lines * 24 / 38) + 2)
