"""Figures of a run of ``tools``: what passed, which calls failed and how, by kind of scenario and by variant."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from step128_evals.runs import Item, Run
from step128_evals.stats import wilson
from step128_evals.tables import columns, markdown_table
from step128_evals.tools.faults import KINDS
from step128_evals.tools.scenarios import KINDS as SCENARIO_KINDS

CARD = (
    "The model card says 0 failed tool calls and names no count. Here a call counts once it is due or made, and fails "
    "if anything is wrong with it, its arguments included."
)
_DEPENDENT = (
    "Variants of one scenario are not independent of each other: intervals of conversations and calls are too narrow, "
    "those of scenarios hold."
)
_GROUPS = ("by_kind", "by_streaming", "by_thinking", "by_depth")


def summarize(run: Run) -> dict[str, Any]:
    """Shares with Wilson intervals. ``failed_calls`` is of the calls that were due or made, never those of steps that
    were not reached; ``faults`` counts conversations by kind of fault, one once a kind."""
    items = run.with_status("passed", "failed")
    calls = sum(item.data["calls"] for item in items)
    unsupported = run.with_status("unsupported")
    return {
        "planned": run.manifest.items_total,
        "missing": run.missing,
        "passed": _passed(items),
        "failed_calls": _failed(sum(item.data["failed_calls"] for item in items), calls),
        "malformed_calls": _failed(sum(item.data["malformed_calls"] for item in items), calls),
        "failed_scenarios": _scenarios(items, "failed_calls"),
        "malformed_scenarios": _scenarios(items, "malformed_calls"),
        "faults": _faults(items),
        "by_kind": _groups(items, lambda item: str(item.data["kind"]), SCENARIO_KINDS),
        "by_streaming": _groups(items, lambda item: "streamed" if item.data["stream"] else "whole"),
        "by_thinking": _groups(items, lambda item: "thinking" if item.data["thinking"] else "plain"),
        "by_depth": _groups(items, lambda item: str(item.data["depth_tokens"])),
        "streamed_equals_whole": _pairs(items),
        "unsupported": {"items": len(unsupported), "reasons": dict(Counter(item.why for item in unsupported))},
    }


def score(run: Run) -> dict[str, float]:
    """Share passed of each scenario over its variants, which are not independent of each other."""
    scenarios = _by_scenario(run.with_status("passed", "failed"))
    return {name: sum(i.status == "passed" for i in items) / len(items) for name, items in scenarios.items()}


def _by_scenario(items: Iterable[Item]) -> dict[str, list[Item]]:
    scenarios: dict[str, list[Item]] = {}
    for item in items:
        scenarios.setdefault(item.data["scenario"], []).append(item)
    return scenarios


def _scenarios(items: Iterable[Item], count: str) -> dict[str, Any]:
    """Of the scenarios in which calls were due or made, those with at least one that failed."""
    groups = [group for group in _by_scenario(items).values() if any(item.data["calls"] for item in group)]
    failed = sum(any(item.data[count] for item in group) for group in groups)
    return {"scenarios": len(groups), "failed": failed, **_share(failed, len(groups))}


def _share(part: int, total: int) -> dict[str, Any]:
    interval = wilson(part, total)
    return {"share": part / total if total else None, "interval": asdict(interval) if interval else None}


def _passed(items: Sequence[Item]) -> dict[str, Any]:
    passed = sum(item.status == "passed" for item in items)
    return {"items": len(items), "passed": passed, **_share(passed, len(items))}


def _failed(failed: int, calls: int) -> dict[str, Any]:
    return {"calls": calls, "failed": failed, **_share(failed, calls)}


def _faults(items: Iterable[Item]) -> dict[str, int]:
    found = Counter(kind for item in items for kind in {fault["kind"] for fault in item.data["faults"]})
    return {kind: found[kind] for kind in KINDS}


def _groups(items: Sequence[Item], key: Callable[[Item], str], order: Sequence[str] = ()) -> dict[str, Any]:
    groups: dict[str, list[Item]] = {name: [] for name in order}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return {
        name: _passed(group) | {"faults": {kind: count for kind, count in _faults(group).items() if count}}
        for name, group in groups.items()
        if group
    }


def _pairs(items: Iterable[Item]) -> dict[str, Any]:
    """Streamed and whole answers to the same, compared by calls, finish reasons, and whether there is text."""
    sides: dict[tuple[str, bool, int], dict[bool, Item]] = {}
    for item in items:
        key = (item.data["scenario"], item.data["thinking"], item.data["depth_tokens"])
        sides.setdefault(key, {})[item.data["stream"]] = item
    pairs = [(both[True], both[False]) for both in sides.values() if len(both) == 2]
    differ = sorted(streamed.id for streamed, whole in pairs if _structure(streamed) != _structure(whole))
    return {"pairs": len(pairs), "equal": len(pairs) - len(differ), "differ": differ}


def _structure(item: Item) -> list[Any]:
    return [
        (
            sorted((call["name"], _normal(call["arguments"])) for call in answer["tool_calls"]),
            answer["finish_reason"],
            bool(answer["text"].strip()),
        )
        for answer in item.data["answers"]
    ]


def _normal(arguments: str) -> str:
    """Equal for equal JSON, however it is written."""
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


def text(summary: dict[str, Any]) -> str:
    """For a terminal."""
    lines = [_partial(summary), columns(_share_rows(summary)), "", _calls_line(summary)]
    lines += [f"  {kind}: {count} conversations" for kind, count in summary["faults"].items() if count]
    lines += [_pairs_line(summary), CARD, _DEPENDENT, *_unsupported_lines(summary)]
    return "\n".join(lines).strip()


def headline(summary: dict[str, Any]) -> str:
    """One line for a table."""
    calls, malformed, passed = (summary[name] for name in ("failed_calls", "malformed_calls", "passed"))
    if not passed["items"]:
        return "nothing answered"
    held = f"{passed['passed']} of {passed['items']} conversations passed"
    if not calls["calls"]:
        return f"no call was due or made; {held}"
    scenarios = summary["failed_scenarios"]
    failed = f"{calls['failed']} of {calls['calls']} calls failed, in {scenarios['failed']} of "
    failed += f"{scenarios['scenarios']} scenarios, {_percent(scenarios)}"
    return f"{failed}; {malformed['failed']} malformed; {held}"


def markdown(run: Run, summary: dict[str, Any], pictures: Path) -> str:
    """A report's section, with bars by kind of scenario and by variant."""
    from step128_evals.tools.pictures import draw_bars

    parts = [_partial(summary), _calls_line(summary), f"{CARD} {_DEPENDENT}", markdown_table(_share_rows(summary))]
    faults = [("fault", "conversations")]
    faults += [(kind.replace("_", " "), str(count)) for kind, count in summary["faults"].items()]
    parts += [markdown_table(faults), _pairs_line(summary), *_unsupported_lines(summary)]
    if summary["passed"]["items"]:
        draw_bars(list(_labelled(summary)), run.manifest.model, pictures / "tools.svg")
        parts.append("![share of conversations passed](tools.svg)")
    return "\n\n".join(part for part in parts if part) + "\n"


def _partial(summary: dict[str, Any]) -> str:
    if not summary["missing"]:
        return ""
    return f"Not whole: {summary['missing']} of {summary['planned']} conversations have no outcome yet."


def _labelled(summary: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    yield "all", summary["passed"]
    for name in _GROUPS:
        for key, row in summary[name].items():
            yield (f"after {key} tokens" if name == "by_depth" else key.replace("_", " ")), row


def _share_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = [("conversations", "passed", "of", "share [95 % interval]")]
    for label, row in _labelled(summary):
        rows.append((label, str(row["passed"]), str(row["items"]), _percent(row)))
    return rows


def _percent(row: dict[str, Any]) -> str:
    if row["share"] is None:
        return "-"
    return f"{row['share']:.1%} [{row['interval']['low']:.1%}, {row['interval']['high']:.1%}]"


def _calls_line(summary: dict[str, Any]) -> str:
    calls, malformed = summary["failed_calls"], summary["malformed_calls"]
    if not calls["calls"]:
        return "Failed calls: none was due or made, so nothing can be said."
    line = f"Failed calls: {calls['failed']} of {calls['calls']}, {_percent(calls)}; malformed: {malformed['failed']}."
    for name, row in (("failed", calls), ("malformed", malformed)):
        if not row["failed"]:
            scenarios = summary[f"{name}_scenarios"]
            line += f" 0 {name} in {scenarios['scenarios']} scenarios still allows up to "
            line += f"{scenarios['interval']['high']:.2%} of scenarios (Wilson, 95 %)."
    return line


def _pairs_line(summary: dict[str, Any]) -> str:
    pairs = summary["streamed_equals_whole"]
    if not pairs["pairs"]:
        return ""
    return (
        f"Streamed and whole answers alike (calls, finish reason, text or none): {pairs['equal']} of {pairs['pairs']}."
    )


def _unsupported_lines(summary: dict[str, Any]) -> list[str]:
    return [f"Unsupported: {count} conversations: {why}." for why, count in summary["unsupported"]["reasons"].items()]
