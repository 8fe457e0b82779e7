"""Draw the dashboards from their JSON with what a Prometheus answers: `draw_dashboards.py --prometheus URL OUT`.

A picture of layout, queries, colours and words for a document or a review, made where no Grafana is. Grafana's own
drawing looks different; each picture says at its foot what it is.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import textwrap
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

FOLDER = Path(__file__).parents[1] / "configs/grafana/dashboards"
COLUMN_INCHES, ROW_INCHES = 0.72, 0.36
PAPER, PANEL, INK, FAINT = "#111217", "#181b1f", "#d8d9da", "#5a5d63"
COLOURS = {
    "green": "#3f9b45",
    "yellow": "#d9a514",
    "orange": "#e0752d",
    "red": "#d93a3f",
    "blue": "#3f79c9",
    "text": "#8e9196",
}
LINES = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#37872d", "#8ab8ff", "#fade2a", "#ffb357")
SUFFIXES = {"none": "", "short": "", "s": " s", "watt": " W", "celsius": " °C", "reqps": " req/s"}
SUFFIXES |= {"reqpm": " req/min", "opm": " /min"}
FOOT = "Drawn from the dashboard's JSON by scripts/draw_dashboards.py{}. Not a screenshot of Grafana."


@dataclass(frozen=True)
class Source:
    """The Prometheus that is asked, and the window that is drawn."""

    url: str
    end: float
    seconds: float
    rate: str

    def ask(self, expr: str, at_once: bool) -> list[dict[str, Any]]:
        """Return the series of an expression."""
        text = expr.replace("$__rate_interval", self.rate).replace("$server", ".*").replace("$gpu", ".*")
        query: dict[str, Any] = {"query": text}
        if at_once:
            path = "query"
            query["time"] = self.end
        else:
            path = "query_range"
            query |= {"start": self.end - self.seconds, "end": self.end, "step": max(1, round(self.seconds / 200))}
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=20) as answer:
            return list(json.load(answer)["data"]["result"])


def main(arguments: list[str]) -> int:
    """Draw them all; return 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prometheus", required=True, metavar="URL")
    parser.add_argument("--seconds", type=float, default=10800.0, help="length of the window")
    parser.add_argument("--rate", default="1m", help="what $__rate_interval stands for")
    parser.add_argument("--about", default="", help="said at the foot about the figures")
    parser.add_argument("out", type=Path)
    parsed = parser.parse_args(arguments)
    draw_all(Source(parsed.prometheus.rstrip("/"), time.time(), parsed.seconds, parsed.rate), parsed.out, parsed.about)
    return 0


def draw_all(source: Source, out: Path, about: str) -> list[Path]:
    """Draw every dashboard that has queries; return the pictures."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for path in sorted(FOLDER.glob("*.json")):
        dashboard = json.loads(path.read_text())
        if any(panel.get("targets") for panel in dashboard["panels"]):
            picture = out / f"{path.stem}.png"
            draw(dashboard, source, picture, about)
            pictures.append(picture)
    return pictures


def draw(dashboard: dict[str, Any], source: Source, picture: Path, about: str) -> None:
    """Draw one."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    width, height = 24 * COLUMN_INCHES, rows * ROW_INCHES + 1.0
    figure = plt.figure(figsize=(width, height), facecolor=PAPER, dpi=80)
    figure.text(0.008, 1 - 0.38 / height, dashboard["title"], color=INK, size=16, weight="bold")
    links = "   ".join(link["title"] for link in dashboard["links"])
    figure.text(0.992, 1 - 0.38 / height, f"dashboards · {links}", color=FAINT, size=10, ha="right")
    foot = FOOT.format(f", {about}" if about else "")
    figure.text(0.008, 0.1 / height, foot, color="#f2cc0c", size=9.5)
    for panel in dashboard["panels"]:
        here = panel["gridPos"]
        left, top = here["x"] * COLUMN_INCHES, here["y"] * ROW_INCHES + 0.6
        box = (left / width, 1 - (top + here["h"] * ROW_INCHES) / height)
        size = (here["w"] * COLUMN_INCHES / width, here["h"] * ROW_INCHES / height)
        if panel["type"] == "row":
            figure.text(
                box[0] + 0.008, box[1] + 0.3 * size[1], f"⌄ {panel['title']}", color=INK, size=11, weight="bold"
            )
        else:
            _panel(figure, panel, source, box, size, here)
    figure.savefig(picture, facecolor=PAPER)
    plt.close(figure)


def _panel(figure: Figure, panel: dict[str, Any], source: Source, box: Any, size: Any, here: dict[str, int]) -> None:
    frame = figure.add_axes((box[0] + 0.002, box[1] + 0.02 / here["h"] * size[1], size[0] - 0.004, size[1] * 0.97))
    frame.set_facecolor(PANEL)
    frame.set(xticks=[], yticks=[])
    for spine in frame.spines.values():
        spine.set_color("#2c3035")
    title = 0.30 / (here["h"] * ROW_INCHES)
    frame.text(0.01, 1 - 0.6 * title, panel["title"], transform=frame.transAxes, color=INK, size=10, va="center")
    kind = panel["type"]
    inside = {"timeseries": (0.145, 0.27), "state-timeline": (0.17, 0.16), "bargauge": (0.26, 0.06)}.get(
        kind, (0.02, 0.04)
    )
    if here["w"] > 16:
        inside = (0.10, inside[1])
    area = (
        box[0] + inside[0] * size[0],
        box[1] + inside[1] * size[1],
        size[0] * (0.98 - inside[0] - (0.11 if kind == "bargauge" else 0)),
        size[1] * (0.96 - inside[1] - title),
    )
    axes = figure.add_axes(area)
    axes.set_facecolor(PANEL)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(colors=FAINT, labelsize=8, length=0)
    series = [
        (target, found)
        for target in panel["targets"]
        for found in source.ask(target["expr"], kind in ("table", "stat", "bargauge"))
    ]
    {"timeseries": _lines, "stat": _stat, "bargauge": _bars, "state-timeline": _states, "table": _table}[kind](
        axes, panel, series, source
    )
    if not series:
        axes.cla()
        axes.set(xticks=[], yticks=[])
        axes.text(
            0.5, 0.5, _defaults(panel)["noValue"], color=FAINT, ha="center", va="center", transform=axes.transAxes
        )


def _lines(axes: Axes, panel: dict[str, Any], series: list[Any], source: Source) -> None:
    defaults = _defaults(panel)
    stacked = defaults["custom"]["stacking"]["mode"] == "normal"
    below: dict[float, float] = {}
    shown = 0
    for place, (target, found) in enumerate(series):
        points = [(float(at), float(value)) for at, value in found["values"]]
        if stacked:
            points = [(at, below.get(at, 0.0) + value) for at, value in points]
            below |= dict(points)
        last = float(found["values"][-1][1])
        label = f"{_legend(target, found)}  {shown_value(last, defaults['unit'], defaults.get('decimals'))}"
        axes.plot(*zip(*points, strict=True), color=LINES[place % 10], lw=1.4, label=label if place < 6 else None)
        shown += 1
    for step in defaults["thresholds"]["steps"][1:] if "thresholdsStyle" in defaults["custom"] else ():
        axes.axhline(step["value"], color=COLOURS[step["color"]], lw=1, ls="--")
    axes.set_xlim(source.end - source.seconds, source.end)
    low, high = axes.get_ylim()
    axes.set_ylim(defaults.get("min", low), defaults.get("max", high if high > low else low + 1))
    axes.grid(color="#2a2d33", lw=0.6)
    axes.yaxis.set_major_formatter(lambda value, _: shown_value(value, defaults["unit"], None))
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
    _clock(axes, source)
    if shown:
        legend = axes.legend(loc="upper left", bbox_to_anchor=(-0.08, -0.11), ncols=2, fontsize=7.5, frameon=False)
        for words in legend.get_texts():
            words.set_color(INK)
    if shown > 6:
        axes.text(
            1, -0.13, f"and {shown - 6} more", color=FAINT, size=7.5, ha="right", va="top", transform=axes.transAxes
        )


def _stat(axes: Axes, panel: dict[str, Any], series: list[Any], source: Source) -> None:
    axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))
    defaults = _defaults(panel)
    for place, (_, found) in enumerate(series):
        value = float(found["value"][1])
        word, colour = _look(value, defaults)
        if panel["options"]["colorMode"] == "background_solid":
            share = 1 / len(series)
            axes.add_patch(Rectangle((place * share, 0), share, 1, color=colour))
            colour = "white"
        middle = (place + 0.5) / len(series)
        axes.text(middle, 0.5, word, color=colour, size=24, weight="bold", ha="center", va="center")


def _bars(axes: Axes, panel: dict[str, Any], series: list[Any], source: Source) -> None:
    defaults = _defaults(panel)
    values = [float(found["value"][1]) for _, found in series]
    top = defaults.get("max", max([*values, 1e-9]))
    for place, ((target, found), value) in enumerate(zip(series, values, strict=True)):
        word, colour = _look(value, defaults)
        axes.barh(place, top, color="#22252b", height=0.7)
        axes.barh(place, value, color=colour, height=0.7)
        axes.text(top * 1.01, place, word, color=colour, size=10, weight="bold", va="center")
        axes.text(-0.02 * top, place, _legend(target, found), color=INK, size=8, ha="right", va="center")
    axes.set(xticks=[], yticks=[], xlim=(0, top), ylim=(max(len(values), 3) - 0.4, -0.6))


def _states(axes: Axes, panel: dict[str, Any], series: list[Any], source: Source) -> None:
    defaults, names = _defaults(panel), []
    for place, (target, found) in enumerate(series):
        names.append(_legend(target, found))
        points = [(float(at), float(value)) for at, value in found["values"]]
        step = max(1, round(source.seconds / 200))
        runs: list[list[float]] = []
        for at, value in points:
            if runs and runs[-1][2] == value and at - runs[-1][1] <= 2 * step:
                runs[-1][1] = at
            else:
                runs.append([at, at, value])
        for begin, end, value in runs:
            word, colour = _look(value, defaults)
            axes.broken_barh([(begin, end - begin + step)], (place - 0.42, 0.84), color=colour)
            if end - begin > source.seconds / 12:
                axes.text((begin + end) / 2, place, word, color="white", size=7.5, ha="center", va="center")
    axes.set_xlim(source.end - source.seconds, source.end)
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names, fontsize=7 if len(names) > 12 else 8, color=INK)
    _clock(axes, source)


def _table(axes: Axes, panel: dict[str, Any], series: list[Any], source: Source) -> None:
    axes.set(xticks=[], yticks=[])
    organize = next(each["options"] for each in panel["transformations"] if each["id"] == "organize")
    units = {
        each["matcher"]["options"]: item["value"]
        for each in panel["fieldConfig"]["overrides"]
        for item in each["properties"]
        if item["id"] == "unit"
    }
    several = len(panel["targets"]) > 1
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for target, found in series:
        row = rows.setdefault(tuple(found["metric"].values()), dict(found["metric"]))
        column = f"Value #{target['refId']}" if several else "Value"
        unit = units.get(organize["renameByName"].get(column, ""), "none")
        row[column] = shown_value(float(found["value"][1]), unit, None)
    columns = list(organize["renameByName"])
    if not rows:
        return
    fits = 9
    cells = [[row.get(column, "") for column in columns] for row in list(rows.values())[:fits]]
    drawn = axes.table(
        cells,
        colLabels=list(organize["renameByName"].values()),
        bbox=(0.0, 1 - 0.092 * (len(cells) + 1), 1.0, 0.092 * (len(cells) + 1)),
        cellLoc="left",
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    for (line, _), cell in drawn.get_celld().items():
        cell.set(facecolor=PANEL if line else "#22252b", edgecolor="#2a2d33")
        cell.get_text().set_color(INK)
    if len(rows) > fits:
        axes.text(1, -0.02, f"and {len(rows) - fits} more", color=FAINT, size=8, ha="right", transform=axes.transAxes)


def shown_value(value: float, unit: str, decimals: int | None) -> str:
    """Return a value in Grafana's way of writing that unit, more or less."""
    if math.isnan(value):
        return "no figure"
    if unit in ("bytes", "Bps", "hertz"):
        base, names = (
            (1024.0, ("B", "KiB", "MiB", "GiB", "TiB")) if unit == "bytes" else (1000.0, ("", "k", "M", "G", "T"))
        )
        power = 0
        while abs(value) >= base and power < 4:
            value, power = value / base, power + 1
        return f"{value:.3g} {names[power]}{ {'bytes': '', 'Bps': 'B/s', 'hertz': 'Hz'}[unit] }"
    if unit == "percentunit":
        return f"{100 * value:.{decimals or 0 if decimals is not None else 1}f} %".replace(".0 %", " %")
    if unit == "s" and abs(value) < 1:
        return f"{1000 * value:.3g} ms"
    suffix = unit.removeprefix("suffix:") if unit.startswith("suffix:") else SUFFIXES[unit]
    if decimals is not None:
        return f"{value:.{decimals}f}{suffix}"
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}") + suffix


def _look(value: float, defaults: dict[str, Any]) -> tuple[str, str]:
    for mapping in defaults["mappings"]:
        found = mapping["options"].get(f"{value:g}")
        if found:
            return found["text"], COLOURS[found["color"]]
    colour = defaults["thresholds"]["steps"][0]["color"]
    for step in defaults["thresholds"]["steps"][1:]:
        if value >= step["value"]:
            colour = step["color"]
    return shown_value(value, defaults["unit"], defaults.get("decimals")), COLOURS[colour]


def _legend(target: dict[str, Any], found: dict[str, Any]) -> str:
    name = re.sub(r"{{\s*(\w+)\s*}}", lambda match: found["metric"].get(match[1], ""), target["legendFormat"])
    return textwrap.shorten(name.strip(), 42, placeholder="…")


def _clock(axes: Axes, source: Source) -> None:
    ticks = [source.end - source.seconds * share for share in (0.8, 0.6, 0.4, 0.2)]
    form = "%H:%M" if source.seconds > 900 else "%H:%M:%S"
    axes.set_xticks(ticks, [time.strftime(form, time.localtime(at)) for at in ticks])


def _defaults(panel: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = panel["fieldConfig"]["defaults"]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
