"""The findings for people and for programs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from step128_launcher.doctor.finding import FAIL, PASS, SKIP, WARN, Finding

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
_STYLES = {PASS: "green", WARN: "yellow", FAIL: "bold red", SKIP: "dim"}


def findings_document(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the JSON document: schema, findings, and how many failed and warned."""
    return {
        "schema": SCHEMA,
        "findings": [
            {"check": one.check, "outcome": one.outcome, "evidence": one.evidence, "remedy": one.remedy}
            for one in findings
        ],
        "failed": _count(findings, FAIL),
        "warned": _count(findings, WARN),
    }


def any_failed(findings: Sequence[Finding]) -> bool:
    """Whether the exit status must say so."""
    return _count(findings, FAIL) > 0


def print_findings(console: "Console", findings: Sequence[Finding]) -> None:
    """Print one line a finding, its remedy below it; then what was not checked, and why; the counts last."""
    width = max((len(one.check) for one in findings), default=0)
    looked = [one for one in findings if one.outcome != SKIP]
    others = [one for one in findings if one.outcome == SKIP]
    for one in looked:
        console.print(f"{one.outcome:4}", style=_STYLES[one.outcome], end="  ")
        _print_one(console, one, width)
    if others:
        console.print("not checked here", style=_STYLES[SKIP])
    for one in others:
        console.print("    ", end="  ")
        _print_one(console, one, width)
    counts = ", ".join(f"{_count(findings, outcome)} {outcome}" for outcome in (PASS, WARN, FAIL, SKIP))
    console.print(f"RESULT  {counts}", markup=False, highlight=False)


def _print_one(console: "Console", one: Finding, width: int) -> None:
    console.print(f"{one.check:{width}}  {one.evidence}", markup=False, highlight=False, soft_wrap=True)
    if one.remedy:
        console.print(f"{'':6}{'':{width}}→ {one.remedy}", markup=False, highlight=False, soft_wrap=True)


def _count(findings: Sequence[Finding], outcome: str) -> int:
    return sum(one.outcome == outcome for one in findings)
