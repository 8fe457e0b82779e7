"""Figures of a needle run, by the mode that its result file names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from step128_evals.needle import corrected_summary
from step128_evals.needle.codeneedle import summary as codeneedle_summary
from step128_evals.runs import Run

_MODES: dict[str, Any] = {"step128": corrected_summary, "codeneedle": codeneedle_summary}


def summarize(run: Run) -> dict[str, Any]:
    """See the mode's module."""
    figures: dict[str, Any] = _MODES[run.manifest.settings["mode"]].summarize(run)
    return figures


def text(summary: dict[str, Any]) -> str:
    """For a terminal."""
    return str(_MODES[summary["mode"]].text(summary))


def headline(summary: dict[str, Any]) -> str:
    """One line for a table."""
    return str(_MODES[summary["mode"]].headline(summary))


def markdown(run: Run, summary: dict[str, Any], pictures: Path) -> str:
    """A report's section."""
    return str(_MODES[summary["mode"]].markdown(run, summary, pictures))


def score(run: Run) -> dict[str, float]:
    """Item id -> 1.0 passed, 0.0 failed."""
    return {item.id: float(item.status == "passed") for item in run.with_status("passed", "failed")}
