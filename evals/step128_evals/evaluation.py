"""What every eval with a result file has in common: the run from probe to summary, and how its figures are shown."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from step128_evals.errors import BadInputError, EvalError, UnsupportedError
from step128_evals.harness import Task, run_tasks
from step128_evals.options import Result, progress, results_path
from step128_evals.probe import Endpoint
from step128_evals.runs import Manifest, Run, open_results

SUMMARIES = {
    "ppl": "step128_evals.perplexity.summary",
    "needle": "step128_evals.needle.summary",
    "tools": "step128_evals.tools.summary",
    "acceptance": "step128_evals.acceptance.summary",
    "depth": "step128_evals.depth.summary",
    "soak": "step128_evals.soak.summary",
    "vision": "step128_evals.vision.summary",
    "reasoning": "step128_evals.reasoning.summary",
}
"""Where each eval's :class:`Summary` is."""


class Summary(Protocol):
    """The module that turns a result file into figures. All of it works without an endpoint."""

    def summarize(self, run: Run) -> dict[str, Any]:
        """Figures, JSON; by their dotted names `gate` finds them. Only what the items hold, with confidence intervals
        as ``{"low":, "high":}``; None for what cannot be said."""

    def text(self, summary: dict[str, Any]) -> str:
        """For a terminal: the figures, what they rest on, and what they do not say."""

    def headline(self, summary: dict[str, Any]) -> str:
        """One line for a table: the main figure with its interval, or why there is none."""

    def markdown(self, run: Run, summary: dict[str, Any], pictures: Path) -> str:
        """A report's section, without its heading; pictures are saved in the folder, and linked as ``name.svg``."""

    def score(self, run: Run) -> dict[str, float]:
        """Item id -> what two runs are compared by: 1.0 passed, 0.0 failed, or the item's figure."""


def summary_of(eval_name: str) -> Summary:
    """The summary module of an eval.

    Raises:
        BadInputError: no such eval.
    """
    if eval_name not in SUMMARIES:
        raise BadInputError(f"no eval is called {eval_name!r}; there are {', '.join(SUMMARIES)}")
    return cast(Summary, importlib.import_module(SUMMARIES[eval_name]))


def summarize(run: Run) -> dict[str, Any]:
    """The figures of a run.

    Raises:
        BadInputError: an item or the settings lack something: the file was edited, or is of another release.
    """
    try:
        return summary_of(run.manifest.eval).summarize(run)
    except KeyError as error:
        raise BadInputError(
            f"{run.path} cannot be summarized: {error} is missing in it. It was made by step128 {run.manifest.version}."
        ) from error


@dataclass(frozen=True)
class Evaluation:
    """One run: all tasks, and the settings that decide them (see :class:`Manifest`)."""

    name: str
    unit: str
    settings: dict[str, Any]
    tasks: Sequence[Task]


async def run_evaluation(parsed: argparse.Namespace, endpoint: Endpoint, evaluation: Evaluation) -> Result:
    """Ask what is missing in the result file, print the summary, return report and exit code.

    Exit code: 0 if every item has an outcome; 4 if none could be asked (unsupported); 70 if some ended in an error.

    Raises:
        EvalError: as :func:`open_results` and :func:`run_tasks`.
    """
    path = results_path(parsed, evaluation.name, endpoint.model)
    manifest = Manifest(
        evaluation.name,
        endpoint.model,
        endpoint.base_url,
        evaluation.settings,
        endpoint.as_dict(),
        items_total=len(evaluation.tasks),
    )
    results = open_results(path, manifest, parsed.fresh)
    total = len(evaluation.tasks)
    kept = total - len(results.pending([task.id for task in evaluation.tasks]))
    if kept:
        only = "nothing is asked now" if kept == total else "only the others are asked"
        begun = results.manifest.started
        print(f"{kept} of {total} items are in {path} since {begun}: {only}; --fresh asks all anew", file=sys.stderr)
    with progress(evaluation.unit) as on_item:
        await run_tasks(evaluation.tasks, results, parsed.concurrency, on_item)
    return report_run(results.run, parsed.json)


def report_run(run: Run, as_json: bool) -> Result:
    """Summarize a run, print it unless JSON is wanted; (report, exit code) as :func:`run_evaluation`."""
    module = summary_of(run.manifest.eval)
    summary = summarize(run)
    errors = run.with_status("error")
    report = summary | {
        "eval": run.manifest.eval,
        "headline": module.headline(summary),
        "model": run.manifest.model,
        "results": str(run.path),
        "started": run.manifest.started,
        "items": len(run.items),
        "items_missing": run.missing,
        "errors": len(errors),
    }
    if not as_json:
        print(module.text(summary))
        print(f"items: {run.path}")
    if errors:
        example = f"{len(errors)} of {len(run.items)} items ended in an error, the first: {errors[0].why}"
        print(f"{example} The same command asks these again.", file=sys.stderr)
    unsupported = run.with_status("unsupported")
    if run.items and len(unsupported) == len(run.items):
        return report | {"unsupported": unsupported[0].why}, UnsupportedError.exit_code
    return report, EvalError.exit_code if errors else 0
