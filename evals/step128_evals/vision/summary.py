"""Figures of a run of ``vision``: right answers by category and size, and whether the pictures made the difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from step128_evals.runs import Item, Run
from step128_evals.stats import mcnemar, wilson
from step128_evals.tables import columns, markdown_table, number
from step128_evals.vision.answers import CUT, FAILURES
from step128_evals.vision.drawing import TILE

SIGNIFICANT = 0.05
ONE_TILE, TILED = f"up to {TILE[0]} pixels", f"above {TILE[0]} pixels"

_SEES = "it sees: with the pictures it answers better than without"
_SEES_NOTHING = "no sign that it sees: without the pictures it answers no worse"


def summarize(run: Run) -> dict[str, Any]:
    """Shares of right answers with Wilson intervals; ``blind`` is the same without pictures, and McNemar's p."""
    items = run.with_status("passed", "failed")
    seeing = [item for item in items if not item.data["blind"]]
    categories = list(dict.fromkeys(item.data["category"] for item in seeing))
    small = [item for item in seeing if item.data["largest_side_pixels"] <= TILE[0]]
    large = [item for item in seeing if item.data["largest_side_pixels"] > TILE[0]]
    blind = _blind(items)
    failures = Counter(item.data["failure"] for item in seeing if item.data["failure"])
    return {
        "planned": run.manifest.items_total,
        "missing": run.missing,
        **_share(seeing),
        "categories": {name: _category(items, name) for name in categories},
        "sizes": {name: _share(part) for name, part in ((ONE_TILE, small), (TILED, large)) if part},
        "blind": blind,
        "verdict": _verdict(blind, failures[CUT], len(seeing)),
        "failures": dict(failures),
        "unsupported": sorted({item.why for item in run.with_status("unsupported")}),
        "rule": run.manifest.settings["rule"],
    }


def headline(summary: dict[str, Any]) -> str:
    """One line for a table."""
    if not summary["asked"]:
        return "nothing answered"
    blind = summary["blind"]
    beside = f"; {blind['passed']} of {blind['asked']} without the pictures" if blind else ""
    return f"{_of(summary)} right ({_interval(summary)}){beside}"


def score(run: Run) -> dict[str, float]:
    """1.0 for a right answer, 0.0 for a wrong one; answers without the pictures are left out."""
    items = run.with_status("passed", "failed")
    return {item.id: float(item.status == "passed") for item in items if not item.data["blind"]}


def text(summary: dict[str, Any]) -> str:
    """For a terminal."""
    return "\n".join(_parts(summary, columns))


def markdown(run: Run, summary: dict[str, Any], pictures: Path) -> str:
    """A report's section, with a picture of the categories."""
    from step128_evals.vision.pictures import draw_categories

    parts = list(_parts(summary, markdown_table))
    if summary["categories"]:
        draw_categories(summary["categories"], run.manifest.model, pictures / "vision.svg")
        parts.append("![right answers by category](vision.svg)")
    return "\n\n".join(parts) + "\n"


def _share(items: Sequence[Item]) -> dict[str, Any]:
    passed = sum(item.status == "passed" for item in items)
    interval = wilson(passed, len(items))
    return {
        "asked": len(items),
        "passed": passed,
        "share": passed / len(items) if items else None,
        "interval": asdict(interval) if interval else None,
    }


def _category(items: Sequence[Item], name: str) -> dict[str, Any]:
    own = [item for item in items if item.data["category"] == name]
    blind = [item for item in own if item.data["blind"]]
    share = _share([item for item in own if not item.data["blind"]])
    return share | {"blind": _share(blind) if blind else None}


def _blind(items: Sequence[Item]) -> dict[str, Any] | None:
    """All that were asked blind; ``p`` by the questions that were asked both ways."""
    blind = [item for item in items if item.data["blind"]]
    if not blind:
        return None
    with_pictures = {item.id: item.status == "passed" for item in items if not item.data["blind"]}
    pairs = [
        (item.status == "passed", with_pictures[id])
        for item in blind
        if (id := item.id.rpartition(".")[0]) in with_pictures
    ]
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    return _share(blind) | {"pairs": len(pairs), "gained": gained, "lost": lost, "p": mcnemar(gained, lost)}


def _verdict(blind: dict[str, Any] | None, cut_off: int, asked: int) -> str:
    if 2 * cut_off > asked:
        return f"whether it sees cannot be said: {cut_off} of {asked} answers were cut off at --max-tokens"
    if blind is None or not blind["pairs"]:
        return "whether it sees cannot be said: nothing was asked without the pictures as well"
    return _SEES if blind["gained"] > blind["lost"] and blind["p"] < SIGNIFICANT else _SEES_NOTHING


def _of(share: dict[str, Any]) -> str:
    return f"{share['passed']} of {share['asked']}"


def _interval(share: dict[str, Any]) -> str:
    if share["interval"] is None:
        return "-"
    return f"95 %: {100 * share['interval']['low']:.1f} to {100 * share['interval']['high']:.1f} %"


def _parts(summary: dict[str, Any], table: Callable[[Sequence[Sequence[str]]], str]) -> Iterator[str]:
    if summary["missing"]:
        yield f"Not whole: {summary['missing']} of {summary['planned']} questions have no outcome yet."
    yield f"{_of(summary)} answers are right ({_interval(summary)})."
    if blind := summary["blind"]:
        yield (
            f"Without the pictures: {_of(blind)} ({_interval(blind)}); of {blind['pairs']} questions asked both ways "
            f"the pictures gained {blind['gained']} and lost {blind['lost']} (McNemar p {number(blind['p'], 4)})."
        )
    yield f"Verdict: {summary['verdict']}."
    rows = [("category", "right", "share, 95 % by Wilson", "without pictures")]
    for name, row in summary["categories"].items():
        rows.append((name, _of(row), _interval(row), _of(row["blind"]) if row["blind"] else "-"))
    for name, row in summary["sizes"].items():
        rows.append((f"pictures {name}", _of(row), _interval(row), "-"))
    yield table(rows)
    for name, meaning in FAILURES.items():
        if name in summary["failures"]:
            yield f"{summary['failures'][name]} failures: {meaning}."
    yield from summary["unsupported"]
    yield f"Rule: {summary['rule']}"
