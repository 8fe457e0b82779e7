"""Write the report: a table of what was and was not run, the card's claims beside it, a section for each eval."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from step128_evals.errors import CannotWriteError
from step128_evals.evaluation import SUMMARIES, summarize, summary_of
from step128_evals.files import write_whole
from step128_evals.report.claims import CLAIMS
from step128_evals.runs import Run

TITLES = {
    "ppl": "Perplexity",
    "needle": "Code needle",
    "tools": "Tool calls",
    "acceptance": "MTP acceptance",
    "depth": "Speed at depth",
    "soak": "Soak",
    "vision": "Vision",
    "reasoning": "Reasoning effort",
}


def write_report(runs: Sequence[Run], folder: Path) -> Path:
    """Write ``report.md`` and its pictures into a folder; returns the document's path.

    Raises:
        CannotWriteError: the folder cannot be made or written.
    """
    parts = [_head(runs), _overview(runs), _claims(runs)]
    for number, run in enumerate(runs):
        parts.append(_section(run, folder / f"{run.manifest.eval}-{number}"))
    document = folder / "report.md"
    write_whole(document, "\n\n".join(part.strip() for part in parts if part.strip()) + "\n")
    return document


def _head(runs: Sequence[Run]) -> str:
    models = sorted({run.manifest.model for run in runs})
    return f"# Evaluation of {', '.join(models)}\n\nMade by `step128-eval report` from the result files named below."


def _overview(runs: Sequence[Run]) -> str:
    lines = ["## What was run", "", "| eval | result | model | state |", "|---|---|---|---|"]
    for run in runs:
        module = summary_of(run.manifest.eval)
        headline = cell(module.headline(summarize(run)))
        lines.append(f"| {TITLES[run.manifest.eval]} | {headline} | {cell(run.manifest.model)} | {_state(run)} |")
    absent = [name for name in SUMMARIES if name not in {run.manifest.eval for run in runs}]
    lines += [f"| {TITLES[name]} | not measured | | no result file |" for name in absent]
    return "\n".join(lines)


def _state(run: Run) -> str:
    errors = len(run.with_status("error"))
    if run.missing:
        return f"not whole: {run.missing_words}, {errors} ended in an error"
    unsupported = len(run.with_status("unsupported"))
    return f"whole, {len(run.items)} items" + (f", {unsupported} unsupported" if unsupported else "")


def _claims(runs: Sequence[Run]) -> str:
    lines = [
        "## Beside the model card",
        "",
        "What the card of Step-3.7-Flash-240REAP claims. Figures of another model only show how they are got.",
        "",
        "| claim | measured here | what the claim leaves open |",
        "|---|---|---|",
    ]
    for claim in CLAIMS:
        found = []
        for run in runs:
            if run.manifest.eval == claim.eval:
                module = summary_of(claim.eval)
                found.append(cell(f"{module.headline(summarize(run))} ({run.manifest.model})"))
        lines.append(f"| {claim.text} | {'; '.join(found) or 'not measured'} | {claim.open} |")
    return "\n".join(lines)


def _section(run: Run, pictures: Path) -> str:
    manifest = run.manifest
    module = summary_of(manifest.eval)
    summary = summarize(run)
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        body = module.markdown(run, summary, pictures).strip()
    except OSError as error:
        raise CannotWriteError(f"{error.filename or pictures}: {error.strerror}") from error
    body = re.sub(r"\]\((?=[\w.-]+\.svg\))", f"]({pictures.name}/", body)
    settings = json.dumps(manifest.settings, ensure_ascii=False, indent=1)
    server = manifest.endpoint.get("server", "")
    return (
        f"## {TITLES[manifest.eval]}: {manifest.model}\n\n"
        f"{manifest.base_url} {server}, begun {manifest.started}, step128 {manifest.version}, `{run.path.name}`: "
        f"{_state(run)}.\n\n{body}\n\n<details><summary>Settings</summary>\n\n```json\n{settings}\n```\n\n</details>"
    )


def cell(text: str) -> str:
    """A text that cannot break out of its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
