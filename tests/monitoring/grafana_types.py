"""TypeScript that holds each dashboard against the types which Grafana publishes as @grafana/schema."""

from __future__ import annotations

import copy
import json
from typing import Any

from dashboard_rules import panels

SCHEMA, COMPILER = "@grafana/schema@13.2.3", "typescript@5.9.3"
_KINDS = {
    "stat": "stat",
    "timeseries": "timeseries",
    "bargauge": "bargauge",
    "state-timeline": "statetimeline",
    "table": "table",
    "text": "text",
}
_WITH_FIELDS = ("timeseries", "state-timeline")
# JSON has strings where Grafana's types have enums; everything else stays as strict as it is there.
_HEAD = """\
import type { Dashboard, Panel } from '@grafana/schema';
type Plain<T> = T extends string ? (string extends T ? string : `${T}`)
  : T extends number | boolean | null | undefined ? T
  : T extends (infer E)[] ? Plain<E>[]
  : unknown extends T ? T
  : { [K in keyof T]: Plain<T[K]> };
type Target = { refId: string; expr: string; datasource: { type: string; uid: string }; editorMode: 'code';
  legendFormat: string; instant: boolean; range: boolean; format: 'table' | 'time_series' };
"""


def program(dashboards: dict[str, dict[str, Any]]) -> str:
    """Return a program that compiles if every dashboard, panel and option is of Grafana's types."""
    lines = [_HEAD]
    for kind in _KINDS.values():
        path = f"@grafana/schema/dist/esm/raw/composable/{kind}/panelcfg/x/{_file(kind)}"
        lines.append(f"import type * as {kind} from '{path}';")
    for number, dashboard in enumerate(dashboards.values()):
        whole = copy.deepcopy(dashboard)
        for place, panel in enumerate(panels(whole)):
            lines += _panel(panel, f"d{number}p{place}")
        for note in whole["annotations"]["list"]:
            del note["target"]["expr"]  # of Prometheus's own query type, which is in another package
        lines.append(f"export const d{number}: Plain<Dashboard> = {json.dumps(whole)};")
    return "\n".join(lines)


def _panel(panel: dict[str, Any], name: str) -> list[str]:
    kind = _KINDS[panel["type"]]
    lines = [f"export const {name}: Partial<Plain<{kind}.Options>> = {json.dumps(panel['options'])};"]
    if panel["type"] in _WITH_FIELDS:
        custom = panel["fieldConfig"]["defaults"]["custom"]
        lines.append(f"export const {name}f: Partial<Plain<{kind}.FieldConfig>> = {json.dumps(custom)};")
    lines += [
        f"export const {name}t{place}: Target = {json.dumps(target)};"
        for place, target in enumerate(panel.get("targets", ()))
    ]
    lines.append(f"export const {name}p: Plain<Panel> = {json.dumps(panel)};")
    return lines


def _file(kind: str) -> str:
    names = {
        "stat": "Stat",
        "timeseries": "TimeSeries",
        "bargauge": "BarGauge",
        "statetimeline": "StateTimeline",
        "table": "Table",
        "text": "Text",
    }
    return f"{names[kind]}PanelCfg_types.gen"
