"""Figures of ``--mode codeneedle``, as the benchmark gives them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from step128_evals.runs import Item, Run
from step128_evals.stats import ratio_interval, wilson

PUBLISHED = (
    "Published by the benchmark (benchmark_plan.md of its repository): Qwen3.6-35B-A3B 283 of 320 lines, "
    "Qwen3.5-35B 11/16 passed, Gemma-3-27B 6/16. There it was 16 functions picked by hand from a file of about 108k "
    "tokens; the repository's corpora are others. So a figure of this run compares with those roughly, and with what "
    "the repository's own program prints exactly."
)
FLAWS = (
    "Blank lines count as lines here, prompts may point at text that does not exist (`function val(` in jQuery, whose "
    "source has `val: function(`), and echoed reasoning counts as invented: --mode step128 corrects these."
)
_NAMES = {"strict": "strict", "relaxed": "relaxed (--relax-indent)"}


def summarize(run: Run) -> dict[str, Any]:
    """For both normalisations: passed, with Wilson's interval; lines matched, with a bootstrap over the functions."""
    settings = run.manifest.settings
    items = run.with_status("passed", "failed")
    return {
        "mode": "codeneedle",
        "corpus": settings["corpus"],
        "commit": settings["commit"],
        "items_planned": len(settings["functions"]),
        "answered": len(items),
        "request_errors": len(run.with_status("error")),
        "no_think": settings["no_think"],
        **{name: _figures(items, name) for name in _NAMES},
    }


def _figures(items: Sequence[Item], name: str) -> dict[str, Any]:
    counts = [item.data[name] for item in items]
    passed = sum(count["passed"] for count in counts)
    matched, asked = ([count[key] for count in counts] for key in ("matched", "asked"))
    rate, share = wilson(passed, len(counts)), ratio_interval(matched, asked) if counts else None
    return {
        "passed": passed,
        "rate": passed / len(counts) if counts else None,
        "interval": vars(rate) if rate else None,
        "lines_matched": sum(matched),
        "lines_asked": sum(asked),
        "line_share": sum(matched) / sum(asked) if counts else None,
        "line_share_interval": vars(share) if share else None,
        "hallucinated": sum(count["hallucinated"] for count in counts),
        "bonus": sum(count["bonus"] for count in counts),
    }


def text(summary: dict[str, Any]) -> str:
    """Figures and caveats."""
    return "\n".join([_counts(summary), *(f"  {row}" for row in _rows(summary)), "", FLAWS, PUBLISHED])


def headline(summary: dict[str, Any]) -> str:
    """Passes with their interval, and lines, as the benchmark counts them."""
    figures = summary["strict"]
    if figures["interval"] is None:
        return "nothing answered yet"
    low, high = (100 * figures["interval"][end] for end in ("low", "high"))
    passed = f"{figures['passed']} of {summary['answered']} passed (95 %: {low:.0f} to {high:.0f} %)"
    return f"{passed}, {figures['lines_matched']} of {figures['lines_asked']} lines"


def markdown(run: Run, summary: dict[str, Any], pictures: Path) -> str:
    """Figures, caveats, and a row a function; no picture."""
    lines = [_counts(summary), "", *(f"- {row}" for row in _rows(summary)), "", FLAWS, "", PUBLISHED, ""]
    lines += ["| function | line | | matched | invented | bonus | relaxed |", "|---|---|---|---|---|---|---|"]
    for item in sorted(run.with_status("passed", "failed"), key=lambda item: int(item.data["start_line"])):
        strict, relaxed = item.data["strict"], item.data["relaxed"]
        lines.append(
            f"| `{item.id}` | {item.data['start_line']} | {item.status} | {strict['matched']}/{strict['asked']} "
            f"| {strict['hallucinated']} | {strict['bonus']} | {relaxed['matched']}/{relaxed['asked']} |"
        )
    return "\n".join(lines) + "\n"


def _counts(summary: dict[str, Any]) -> str:
    answered, planned = summary["answered"], summary["items_planned"]
    head = f"codeneedle, corpus {summary['corpus']}: {answered} of {planned} functions answered"
    head += " (partial)" if answered < planned else ""
    if summary["request_errors"]:
        head += f"; {summary['request_errors']} ended in an error and count neither way"
    return head


def _rows(summary: dict[str, Any]) -> list[str]:
    return [_row(title, summary[name], summary["answered"]) for name, title in _NAMES.items()]


def _row(title: str, figures: dict[str, Any], answered: int) -> str:
    if figures["interval"] is None:
        return f"{title}: nothing answered yet"
    low, high = (100 * figures["interval"][end] for end in ("low", "high"))
    return (
        f"{title}: passed {figures['passed']}/{answered} (95 %: {low:.0f} to {high:.0f} %), "
        f"lines {figures['lines_matched']}/{figures['lines_asked']}, "
        f"hallucinated {figures['hallucinated']}, bonus {figures['bonus']}"
    )
