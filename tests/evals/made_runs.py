"""Result files made by hand, and the smallest eval that can be summarized."""

from pathlib import Path
from typing import Any

from step128_evals.evaluation import SUMMARIES
from step128_evals.runs import Item, Manifest, Run, open_results, read_run
from step128_evals.stats import wilson

NAME = "tools"
"""The eval whose place the smallest one takes."""


def summarize(run: Run) -> dict[str, Any]:
    values = list(score(run).values())
    interval = wilson(sum(value == 1 for value in values), len(values))
    low = interval.low if interval else None
    return {"rate": sum(values) / len(values) if values else None, "interval": {"low": low}, "list": [1, 2]}


def text(summary: dict[str, Any]) -> str:
    return f"rate {summary['rate']}"


def headline(summary: dict[str, Any]) -> str:
    return f"rate {summary['rate']} | of all"


def markdown(run: Run, summary: dict[str, Any], pictures: Path) -> str:
    (pictures / "bars.svg").write_text("<svg/>")
    return "![bars](bars.svg) and [a link](https://example.org/x)"


def score(run: Run) -> dict[str, float]:
    values = {"passed": 1.0, "failed": 0.0}
    return {
        item.id: values[item.status] if item.status in values else item.data["value"]
        for item in run.with_status("passed", "failed", "measured")
    }


def install(monkeypatch: Any) -> None:
    """Let :func:`summary_of` give this module for :data:`NAME` and ``ppl``."""
    for name in (NAME, "ppl"):
        monkeypatch.setitem(SUMMARIES, name, "made_runs")


def make(path: Path, outcomes: dict[str, Any], eval_name: str = NAME, total: int | None = None, **settings: Any) -> Run:
    """A result file; an outcome is a status, or a figure."""
    manifest = Manifest(eval_name, "m", "http://h", settings, {}, len(outcomes) if total is None else total)
    results = open_results(path, manifest)
    for id, outcome in outcomes.items():
        if isinstance(outcome, str):
            results.append(Item(id, outcome, "why" if outcome not in ("passed", "failed") else ""))  # type: ignore
        else:
            results.append(Item(id, "measured", data={"value": outcome}))
    return read_run(path)
