"""A whole dashboard: its panels in rows, variables, links to the others and to the runbook."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panels import DATA_SOURCE, RUNBOOK, Json, panel_link

COLUMNS = 24
ROOT = Path(__file__).parents[2]
SCHEMA_VERSION = 42  # of Grafana 13.2 (@grafana/schema); later ones migrate it when they load it


@dataclass(frozen=True)
class Band:
    """Panels side by side, each as wide as the number beside it. With a title, a heading stands above them."""

    height: int
    panels: tuple[tuple[int, Json], ...]
    title: str = ""


def variable(name: str, label: str, query: str, description: str) -> Json:
    """Return a choice of one, several or all values of a label."""
    return {
        "type": "query",
        "name": name,
        "label": label,
        "description": description,
        "datasource": DATA_SOURCE,
        "query": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


SERVER = variable("server", "Server", 'label_values(up{job="step128"}, server)', "The box, as prometheus.yml names it.")
GPU = variable(
    "gpu", "GPU", 'label_values(step128_gpu_info{server=~"$server"}, gpu)', "PCI address, which stays the same."
)
SOURCE: Json = {
    "type": "datasource",
    "name": "datasource",
    "label": "Data source",
    "description": "The Prometheus to ask.",
    "query": "prometheus",
    "current": {"text": "Prometheus", "value": "prometheus"},
    "refresh": 1,
}


def runbook_sections() -> list[tuple[str, str]]:
    """Return heading and text of each alert in the runbook; the first has the heading `Where to look`."""
    whole = (ROOT / "docs/runbook.md").read_text()
    first, *rest = re.split(r"^## (\w+)\n", whole, flags=re.MULTILINE)
    intro = first.split("\n", 1)[1]
    return [("Where to look", intro.strip()), *zip(rest[::2], (part.strip() for part in rest[1::2]), strict=True)]


def runbook_ids() -> dict[str, int]:
    """Return the id of each alert's panel in the dashboard Runbook."""
    return {name: place for place, (name, _) in enumerate(runbook_sections(), 1)}


def dashboard(name: str, title: str, description: str, bands: list[Band], *variables: Json, **more: Any) -> Json:
    """Return a dashboard as Grafana's JSON, with its panels placed from the top down."""
    return {
        "uid": f"step128-{name}",
        "title": f"step128: {title}",
        "description": description,
        "tags": ["step128"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": list(variables)},
        "annotations": {"list": [_critical()] if variables else []},
        "links": _links(name),
        "panels": _placed(bands),
        **more,
    }


def _placed(bands: list[Band]) -> list[Json]:
    placed: list[Json] = []
    ids, y = runbook_ids(), 0
    for band in bands:
        if band.title:
            here = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
            placed.append({"type": "row", "title": band.title, "collapsed": False, "gridPos": here, "panels": []})
            y += 1
        x = 0
        for width, panel in band.panels:
            alerts = panel.get("alerts", ())
            links = [panel_link(alert, ids[alert]) for alert in alerts]
            here = {"h": band.height, "w": width, "x": x, "y": y}
            own = {key: value for key, value in panel.items() if key != "alerts"}
            placed.append({**own, "gridPos": here, **({"links": links} if links else {})})
            x += width
        if x > COLUMNS:
            raise ValueError(f"panels of {x} columns side by side; there are {COLUMNS}")
        y += band.height
    return [{"id": place, **panel} for place, panel in enumerate(placed, 1)]


def _critical() -> Json:
    return {
        "name": "Critical alerts",
        "datasource": DATA_SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": "red",
        "target": {
            "refId": "Anno",
            "expr": 'ALERTS{alertstate="firing",severity="critical",server=~"$server"}',
        },
    }


def _links(name: str) -> list[Json]:
    plain = {"asDropdown": False, "targetBlank": False, "keepTime": True, "includeVars": True, "icon": "dashboard"}
    others = {"type": "dashboards", "title": "step128", "tags": ["step128"], "tooltip": "The other dashboards"}
    runbook = {
        "type": "link",
        "title": "What to do (runbook)",
        "url": f"/d/{RUNBOOK}",
        "tags": [],
        "tooltip": "What each alert means and what to do about it",
    }
    return [plain | others, *([] if name == "runbook" else [plain | runbook | {"icon": "doc", "includeVars": False}])]
