"""The parts that dashboards are made of: queries, panels of each kind, and their look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

DATA_SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
GREEN, YELLOW, ORANGE, RED, BLUE, GREY = "green", "yellow", "orange", "red", "blue", "text"
RUNBOOK = "step128-runbook"


@dataclass(frozen=True)
class Query:
    """One PromQL expression and how its series are called. A table's query is asked for one moment only."""

    expr: str
    legend: str
    table: bool = False


def steps(*limits: tuple[float, str], base: str = GREEN) -> Json:
    """Return thresholds: `base` below the first limit, then each colour from its limit on."""
    found = [{"color": base, "value": None}, *({"color": color, "value": value} for value, color in limits)]
    return {"mode": "absolute", "steps": found}


def words(names: dict[float, tuple[str, str]]) -> list[Json]:
    """Return a mapping of values to words and colours."""
    options = {
        f"{value:g}": {"text": text, "color": color, "index": index}
        for index, (value, (text, color)) in enumerate(names.items())
    }
    return [{"type": "value", "options": options}]


def time_series(title: str, description: str, unit: str, *queries: Query, **look: Any) -> Json:
    """Return lines over time. look: min, max, stack, thresholds (drawn as lines), right ({regex: unit}), decimals."""
    custom: Json = {
        "drawStyle": "line",
        "lineWidth": 2,
        "fillOpacity": 25 if look.get("stack") else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if look.get("stack") else "none", "group": "A"},
    }
    if "thresholds" in look:
        custom["thresholdsStyle"] = {"mode": "dashed"}
    options = {
        "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return _panel("timeseries", title, description, unit, queries, options, look, custom)


def stat(title: str, description: str, unit: str, query: Query, **look: Any) -> Json:
    """Return one big number, coloured by its thresholds or words."""
    options = {
        "colorMode": "background_solid" if look.get("loud") else "value",
        "graphMode": "none" if look.get("loud") or look.get("words") else "area",
        "justifyMode": "center",
        "orientation": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "auto",
        "wideLayout": True,
    }
    return _panel("stat", title, description, unit, (query,), options, look)


def bars(title: str, description: str, unit: str, query: Query, **look: Any) -> Json:
    """Return a horizontal bar for the last value of each series."""
    options = {
        "displayMode": "basic",
        "orientation": "horizontal",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "showUnfilled": True,
        "valueMode": "color",
        "namePlacement": "left",
        "sizing": "auto",
        "minVizHeight": 16,
        "minVizWidth": 8,
        "maxVizHeight": 40,
    }
    return _panel("bargauge", title, description, unit, (query,), options, look)


def timeline(title: str, description: str, query: Query, **look: Any) -> Json:
    """Return states over time, a row a series; `words` says what a value means."""
    options = {
        "mergeValues": True,
        "showValue": "auto",
        "alignValue": "left",
        "rowHeight": 0.85,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False, "calcs": []},
        "tooltip": {"mode": "single", "sort": "none"},
    }
    return _panel("state-timeline", title, description, "none", (query,), options, look, {"fillOpacity": 80})


def table(title: str, description: str, unit: str, *queries: Query, **look: Any) -> Json:
    """Return a table of instant queries joined by their labels. look: columns {"Value #A": (name, unit or none)}."""
    options = {"showHeader": True, "cellHeight": "sm", "frameIndex": 0}
    columns: dict[str, tuple[str, str | None]] = look.pop("columns")
    panel = _panel("table", title, description, unit, queries, options, look, {"align": "auto"})
    shown = {name: text for name, (text, _) in columns.items()}
    organize = {
        "excludeByName": {"Time": True} | ({} if any("Value" in name for name in columns) else {"Value": True}),
        "renameByName": shown,
        "indexByName": _order(columns),
    }
    panel["transformations"] = [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": organize},
    ]
    panel["fieldConfig"]["overrides"] += [
        override("byName", text, unit=its_unit) for text, its_unit in columns.values() if its_unit
    ]
    return panel


def text(title: str, description: str, markdown: str) -> Json:
    """Return a panel of words; Grafana renders its Markdown."""
    code = {"language": "plaintext", "showLineNumbers": False, "showMiniMap": False}
    options = {"mode": "markdown", "content": markdown, "code": code}
    return {"type": "text", "title": title, "description": description, "options": options}


def override(matcher: str, name: str, **properties: Any) -> Json:
    """Return what holds for the fields that `matcher` (byName, byRegexp) finds under `name`."""
    return {
        "matcher": {"id": matcher, "options": name},
        "properties": [{"id": key, "value": value} for key, value in properties.items()],
    }


def runbook_link(alert: str, panel_id: int) -> Json:
    """Return a link of a value to the heading of an alert, which is a panel of the dashboard Runbook."""
    return {
        "title": f"Runbook: {alert}",
        "url": f"/d/{RUNBOOK}?viewPanel=panel-{panel_id}",
        "targetBlank": False,
    }


def panel_link(alert: str, panel_id: int) -> Json:
    """Return the same as a link of a panel, in its corner."""
    look = {"type": "link", "icon": "doc", "tags": [], "tooltip": f"What to do when {alert} fires"}
    return {**runbook_link(alert, panel_id), **look, "asDropdown": False, "includeVars": False, "keepTime": False}


def _panel(
    kind: str,
    title: str,
    description: str,
    unit: str,
    queries: tuple[Query, ...],
    options: Json,
    look: Json,
    custom: Json | None = None,
) -> Json:
    defaults: Json = {
        "unit": unit,
        "color": {"mode": "thresholds" if kind != "timeseries" else "palette-classic"},
        "thresholds": look.get("thresholds", steps(base=BLUE)),
        "mappings": words(look["words"]) if "words" in look else [],
        "noValue": look.get("no_value", "no data"),
    }
    defaults |= {key: look[key] for key in ("min", "max", "decimals") if key in look}
    if custom is not None:
        defaults["custom"] = custom
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATA_SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": list(look.get("overrides", ()))},
        "options": options,
        "targets": [_target(query, "ABCDEFGH"[place]) for place, query in enumerate(queries)],
        "alerts": look.get("alerts", ()),
    }


def _target(query: Query, ref_id: str) -> Json:
    return {
        "refId": ref_id,
        "datasource": DATA_SOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend,
        "instant": query.table,
        "range": not query.table,
        "format": "table" if query.table else "time_series",
    }


def _order(columns: dict[str, Any]) -> dict[str, int]:
    return {name: place for place, name in enumerate(columns)}
