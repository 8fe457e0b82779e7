"""Rules for dashboards: those of Grafana's dashboard-linter that apply here, and our own, in our own words.

The linter itself is a Go program that this project does not fetch. Each rule returns what is wrong, in words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
COLUMNS = 24
_VARIABLE = re.compile(r"\$\{?(\w+)")
_BUILT_IN = {"__rate_interval"}
# A rate of a counter must span at least four scrapes, which only $__rate_interval promises at every zoom.
_WINDOW = re.compile(r"\b(rate|irate|increase)\((?:[^()]|\([^()]*\))*?\[([^\]]+)\]")
UNITS = {
    *("none", "short", "bytes", "Bps", "s", "watt", "celsius", "hertz", "percentunit", "reqps", "reqpm", "opm"),
    *("suffix: tok", "suffix: tok/s"),
}


def panels(dashboard: Json) -> Iterator[Json]:
    """Yield all panels but rows, those inside of rows included."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def targets(dashboard: Json) -> Iterator[tuple[Json, Json]]:
    """Yield every panel with each of its queries."""
    for panel in panels(dashboard):
        for target in panel.get("targets", ()):
            yield panel, target


def faults(dashboard: Json, uids: set[str]) -> list[str]:
    """Return all that is wrong with a dashboard; `uids` are those that a link may lead to."""
    found = [*_of_the_whole(dashboard), *_of_places(dashboard), *_of_links(dashboard, uids)]
    for panel in panels(dashboard):
        found += [f"{panel.get('title', panel['id'])}: {words}" for words in _of_a_panel(panel, _variables(dashboard))]
    return found


def _variables(dashboard: Json) -> set[str]:
    return {variable["name"] for variable in dashboard["templating"]["list"]}


def _of_the_whole(dashboard: Json) -> Iterator[str]:
    for key in ("uid", "title", "description", "tags"):
        if not dashboard.get(key):
            yield f"no {key}"
    listed = dashboard["templating"]["list"]
    used = any(True for _ in targets(dashboard))
    if used and not any(each["type"] == "datasource" and each["query"] == "prometheus" for each in listed):
        yield "no variable for the data source"
    if used and "server" not in _variables(dashboard):
        yield "no variable `server`"
    for each in listed:
        if not each.get("label"):
            yield f"variable {each['name']} has no label"
        if each["type"] == "query" and (each["datasource"]["uid"] != "${datasource}" or each["allValue"] != ".*"):
            yield f"variable {each['name']} asks a fixed data source, or All is not `.*`"
        if each["type"] == "query" and each["refresh"] != 2:
            yield f"variable {each['name']} is not asked again when the time range changes"


def _of_places(dashboard: Json) -> Iterator[str]:
    all_panels = [*dashboard["panels"], *(inner for panel in dashboard["panels"] for inner in panel.get("panels", ()))]
    ids = [panel["id"] for panel in all_panels]
    if len(set(ids)) < len(ids):
        yield "two panels with one id"
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        here = panel["gridPos"]
        if here["x"] < 0 or here["x"] + here["w"] > COLUMNS or here["h"] < 1:
            yield f"{panel['title']} reaches beyond the {COLUMNS} columns"
        for x in range(here["x"], here["x"] + here["w"]):
            for y in range(here["y"], here["y"] + here["h"]):
                other = taken.setdefault((x, y), panel["title"])
                if other != panel["title"]:
                    yield f"{panel['title']} lies over {other}"
                    return


def _of_links(dashboard: Json, uids: set[str]) -> Iterator[str]:
    if not any(
        link["type"] == "dashboards" and link["includeVars"] and link["keepTime"] for link in dashboard["links"]
    ):
        yield "no links to the other dashboards that keep time and variables"
    for address in re.findall(r'"url": "([^"]*)"', str(dashboard).replace("'", '"')):
        match = re.match(r"/d/([\w-]+)", address)
        if match is None or match[1] not in uids:
            yield f"a link leads nowhere: {address}"


def _of_a_panel(panel: Json, variables: set[str]) -> Iterator[str]:
    for key in ("title", "description"):
        if not panel.get(key):
            yield f"no {key}"
    if panel["type"] == "text":
        return
    if panel["datasource"] != {"type": "prometheus", "uid": "${datasource}"}:
        yield "does not ask the data source of the variable"
    defaults = panel["fieldConfig"]["defaults"]
    if defaults.get("unit") not in UNITS:
        yield f"unit {defaults.get('unit')!r} is none of ours"
    if not defaults.get("noValue"):
        yield "does not say what no data means"
    if not panel["targets"]:
        yield "asks nothing"
    ids = [target["refId"] for target in panel["targets"]]
    if len(set(ids)) < len(ids) or not all(ids):
        yield "two queries with one refId, or one without"
    for target in panel["targets"]:
        yield from _of_a_query(panel, target, variables)


def _of_a_query(panel: Json, target: Json, variables: set[str]) -> Iterator[str]:
    expr = target["expr"]
    if target["datasource"] != panel["datasource"]:
        yield "a query asks another data source"
    if panel["type"] != "table" and not target["legendFormat"]:
        yield "a query has no legend"
    if target["instant"] == target["range"] or (panel["type"] == "table") != target["instant"]:
        yield "a table asks for one moment, everything else for a range"
    for name in set(_VARIABLE.findall(expr)) - variables - _BUILT_IN:
        yield f"${name} is not defined"
    for function, window in _WINDOW.findall(expr):
        if window != "$__rate_interval":
            yield f"{function} over [{window}] and not [$__rate_interval]"
    for name, labels in re.findall(r"\b((?:vllm:|step128[_:]|up\b|ALERTS\b)[\w:]*)(\{[^}]*\})?", expr):
        if 'server=~"$server"' not in labels:
            yield f"{name} is not limited to $server"
    for name in re.findall(r"(\w+_(?:total|bucket))\b", expr):
        if not re.search(rf"(rate|increase)\(\s*[\w:]*{name}\b", expr):
            yield f"the counter {name} is shown without rate or increase"
