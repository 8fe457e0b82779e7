"""A result file of ``soak`` as verdicts, figures by kind, and a timeline."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from scipy import stats

from step128_evals.runs import Item, Run
from step128_evals.soak.items import of_kind, requests, soaked_seconds
from step128_evals.soak.plan import WEIGHTS
from step128_evals.soak.verdicts import all_verdicts
from step128_evals.stats import CONFIDENCE
from step128_evals.tables import columns, markdown_table, number, with_interval

_MEDIANS = (
    "First token and whole are medians with their 95 % intervals, from six requests on; loads differ within them."
)


def summarize(run: Run) -> dict[str, Any]:
    """``verdicts`` by name, each with its outcome, and figures of each kind of request."""
    asked = requests(run)
    kinds = {}
    for kind in (*WEIGHTS, "canary"):
        items = of_kind(run, kind)
        if items:
            kinds[kind] = _figures(items)
    sessions = of_kind(run, "session")
    verdicts = all_verdicts(run)
    return {
        "minutes": soaked_seconds(run) / 60,
        "minutes_wanted": run.manifest.settings["minutes"],
        "whole": "whole" in run.items and run.items["whole"].status == "measured",
        "sessions": [{"at": item.data["at"], "started": item.data["started"]} for item in sessions],
        "requests": len(asked),
        "failed": sum(item.status == "failed" for item in asked),
        "verdicts": verdicts,
        "verdicts_failed": sum(verdict["outcome"] == "failed" for verdict in verdicts.values()),
        "kinds": kinds,
    }


def _figures(items: list[Item]) -> dict[str, Any]:
    answered = [item.data for item in items if item.status == "passed" and "seconds" in item.data]
    whole, first = ([data[name] for data in answered] for name in ("seconds", "first_token_seconds"))
    return {
        "requests": len(items),
        "failed": sum(item.status == "failed" for item in items),
        "cancelled": sum(bool(item.data.get("cancelled")) for item in items),
        "generated_tokens": sum(data["tokens"] for data in answered),
        "median_seconds": _median(whole),
        "median_seconds_interval": _median_interval(whole),
        "median_first_token_seconds": _median(first),
        "median_first_token_seconds_interval": _median_interval(first),
        "slowest_seconds": max(whole, default=None),
    }


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _median_interval(values: list[float]) -> dict[str, float] | None:
    """Two of the values themselves, by the sign test (Thompson 1936): exact for any distribution; None below six."""
    below = int(stats.binom.ppf((1 - CONFIDENCE) / 2, len(values), 0.5)) if values else 0
    ordered = sorted(values)
    return {"low": ordered[below - 1], "high": ordered[-below]} if below else None


def text(summary: dict[str, Any]) -> str:
    """What was done, the verdicts, a table of kinds."""
    verdicts = [f"{name:<18}{outcome:<12}  {why}" for name, outcome, why in _verdict_rows(summary)]
    return "\n".join([_what(summary), "", *verdicts, "", columns(_rows(summary)), _MEDIANS])


def headline(summary: dict[str, Any]) -> str:
    """Minutes, requests, and the verdicts that are not passed."""
    outcomes = {name: verdict["outcome"] for name, verdict in summary["verdicts"].items()}
    parts = [f"{outcome}: {', '.join(n for n, o in outcomes.items() if o == outcome)}" for outcome in _order(outcomes)]
    minutes = f"{summary['minutes']:.1f} of {summary['minutes_wanted']:g} minutes"
    return f"{minutes}, {summary['failed']} of {summary['requests']} requests failed; {'; '.join(parts)}"


def _order(outcomes: dict[str, str]) -> list[str]:
    return [outcome for outcome in ("failed", "passed", "unsupported") if outcome in outcomes.values()]


def markdown(run: Run, summary: dict[str, Any], pictures: Path) -> str:
    """The same, with the timeline."""
    from step128_evals.soak.pictures import draw_timeline

    parts = [_what(summary), markdown_table(_verdict_rows(summary)), markdown_table(_rows(summary)), _MEDIANS]
    if run.items:
        draw_timeline(run, pictures / "soak.svg")
        parts.append("![timeline](soak.svg)")
    return "\n\n".join(parts)


def score(run: Run) -> dict[str, float]:
    """1 for an answered request, 0 for a failed one, by number: equal numbers ask alike.

    That is the same question, but for a long prompt: its text is new each time, of the same length.
    """
    return {item.id: float(item.status == "passed") for item in requests(run)}


def _what(summary: dict[str, Any]) -> str:
    line = f"{summary['minutes']:.1f} of {summary['minutes_wanted']:g} minutes, {summary['requests']} requests"
    if not summary["whole"]:
        line += "; not whole"
    pauses = [f"{session['at'] / 60:.1f}" for session in summary["sessions"][1:]]
    return line + (f"; interrupted and resumed at minute {', '.join(pauses)}" if pauses else "") + "."


def _verdict_rows(summary: dict[str, Any]) -> list[list[str]]:
    rows = [["verdict", "outcome", "why"]]
    return rows + [[name, verdict["outcome"], verdict["why"]] for name, verdict in summary["verdicts"].items()]


def _rows(summary: dict[str, Any]) -> list[list[str]]:
    rows = [["kind", "requests", "failed", "cut off by us", "tokens", "first token, s", "whole, s", "slowest, s"]]
    for kind, figures in summary["kinds"].items():
        counts = [figures[name] for name in ("requests", "failed", "cancelled", "generated_tokens")]
        medians = [
            with_interval(figures[name], figures[f"{name}_interval"], 2)
            for name in ("median_first_token_seconds", "median_seconds")
        ]
        rows.append([kind, *map(str, counts), *medians, number(figures["slowest_seconds"], 2)])
    return rows
