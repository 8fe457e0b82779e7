"""The dashboards: as generated, PromQL over metrics that exist, Grafana's types, a linter's rules, real answers."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dashboard_feed
import dashboard_rules
import grafana_types
import promql_parser
import pytest
import yaml

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "configs/grafana"
PATHS = sorted((GRAFANA / "dashboards").glob("*.json"))
DASHBOARDS: dict[str, dict[str, Any]] = {path.stem: json.loads(path.read_text()) for path in PATHS}
PROGRAM, NPM = shutil.which("prometheus"), shutil.which("npm")
SUFFIXES = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
# Not in the launcher's scrape: of Prometheus itself, and of our middleware inside of vLLM.
OTHERS = {
    "up": {"job", "instance", "server"},
    "ALERTS": {"alertname", "alertstate", "severity", "server"},
    "step128_requests_refused_total": {"reason"},
}
ADDED = {"job", "instance", "server"}
Rule = Any
Measured = Callable[[str], None]


def plain(expr: str) -> str:
    """The expression as Prometheus gets it."""
    return expr.replace("$__rate_interval", "1m").replace("$server", ".*").replace("$gpu", ".*")


def selectors(expr: str) -> list[Any]:
    found: list[Any] = []
    promql_parser.walk(
        promql_parser.parse(plain(expr)),
        lambda node: found.append(node) if isinstance(node, promql_parser.VectorSelector) else None,
    )
    return found


def expressions() -> list[tuple[str, str, str]]:
    """Dashboard, panel and expression of every query, those of variables and annotations included."""
    found = [
        (name, panel["title"], target["expr"])
        for name, dashboard in DASHBOARDS.items()
        for panel, target in dashboard_rules.targets(dashboard)
    ]
    for name, dashboard in DASHBOARDS.items():
        found += [(name, note["name"], note["target"]["expr"]) for note in dashboard["annotations"]["list"]]
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
                assert match, variable["query"]
                found.append((name, f"${variable['name']}", match[1]))
    return found


def vllm_names() -> set[str]:
    lines = (ROOT / "tests/monitoring/vllm_0_32_metrics.txt").read_text().splitlines()
    pairs = [line.split() for line in lines if not line.startswith("#")]
    return {f"{name}{suffix}" for kind, name in pairs for suffix in SUFFIXES[kind]}


def test_the_files_are_as_generated() -> None:
    command = [sys.executable, "scripts/dashboards", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert set(DASHBOARDS) == {"overview", "speculation", "memory", "gpus", "requests", "runbook"}


def test_no_dashboard_breaks_a_rule() -> None:
    uids = {dashboard["uid"] for dashboard in DASHBOARDS.values()}
    assert len(uids) == len(DASHBOARDS)
    faults = {name: found for name, board in DASHBOARDS.items() if (found := dashboard_rules.faults(board, uids))}
    assert not faults, json.dumps(faults, indent=1)


BREAKS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no unit": lambda panel: panel["fieldConfig"]["defaults"].pop("unit"),
    "no description": lambda panel: panel.update(description=""),
    "no legend": lambda panel: panel["targets"][0].update(legendFormat=""),
    "fixed data source": lambda panel: panel["datasource"].update(uid="prometheus"),
    "fixed window": lambda panel: panel["targets"][0].update(expr='rate(vllm:x_total{server=~"$server"}[5m])'),
    "bare counter": lambda panel: panel["targets"][0].update(expr='sum(vllm:x_total{server=~"$server"})'),
    "every server": lambda panel: panel["targets"][0].update(expr="vllm:num_requests_running"),
    "unknown variable": lambda panel: panel["targets"][0].update(expr='vllm:x{server=~"$server",a="$b"}'),
    "one refId twice": lambda panel: panel["targets"].append(panel["targets"][0]),
    "one id twice": lambda panel: panel.update(id=2),
    "over another": lambda panel: panel["gridPos"].update(x=1),
    "beyond the edge": lambda panel: panel["gridPos"].update(w=25),
    "link to nowhere": lambda panel: panel.update(links=[{"title": "x", "url": "/d/gone"}]),
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_rules_can_fail(name: str) -> None:
    dashboard = copy.deepcopy(DASHBOARDS["requests"])
    BREAKS[name](dashboard["panels"][0])
    assert dashboard_rules.faults(dashboard, {board["uid"] for board in DASHBOARDS.values()})


def test_every_query_is_promql_over_metrics_that_exist(rules: list[Rule], exported: dict[str, set[str]]) -> None:
    recorded = {rule.name for rule in rules if not rule.alert}
    known = set(exported) | vllm_names() | recorded | set(OTHERS)
    for dashboard, panel, expr in expressions():
        found = selectors(expr)
        assert found, (dashboard, panel)
        for selector in found:
            assert selector.name in known, (dashboard, panel, selector.name)
            labels = exported.get(selector.name, OTHERS.get(selector.name))
            for matcher in selector.matchers.matchers if labels is not None else ():
                assert matcher.name in labels | ADDED, (dashboard, panel, selector.name, matcher.name)


def test_the_middleware_counts_refusals_by_that_name() -> None:
    guard = (ROOT / "launcher/step128_launcher/middleware/guard.py").read_text()
    assert re.search(r'Counter\(\s*"step128_requests_refused",[^)]*\["reason"\]', guard)


def test_every_alert_leads_to_its_runbook(rules: list[Rule]) -> None:
    alerts = {rule.name for rule in rules if rule.alert}
    titles = {panel["id"]: panel["title"] for panel in DASHBOARDS["runbook"]["panels"]}
    assert set(titles.values()) == alerts | {"Where to look"}
    (timeline,) = (panel for panel in DASHBOARDS["overview"]["panels"] if panel["title"] == "Alerts")
    linked = {each["matcher"]["options"] for each in timeline["fieldConfig"]["overrides"]}
    assert linked == alerts
    links = re.findall(r'"title": "Runbook: (\w+)",\s+"url": "/d/([\w-]+)\?viewPanel=panel-(\d+)"', PATHS_TEXT)
    assert {name for name, _, _ in links} == alerts
    assert all(uid == "step128-runbook" and titles[int(place)] == name for name, uid, place in links)


PATHS_TEXT = "".join(path.read_text() for path in PATHS)


def test_states_and_thresholds_are_the_launcher_s() -> None:
    """The words of the state are those of the launcher, and the dashed lines those of the rules."""
    from step128_launcher.supervisor.status import State

    (state,) = (panel for panel in DASHBOARDS["overview"]["panels"] if panel["title"] == "State")
    words = {each["text"] for each in state["fieldConfig"]["defaults"]["mappings"][0]["options"].values()}
    assert words == {state.value for state in State} | {"unreachable"}
    requests = (ROOT / "configs/prometheus/rules/requests.yml").read_text()
    server = (ROOT / "configs/prometheus/rules/server.yml").read_text()
    assert "step128:kv_cache_usage:ratio > 0.95" in requests and "tokens_rate5m < 1.2" in requests
    assert "step128:plan_difference:ratio > 0.1" in server
    limits = {
        panel["title"]: panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1]["value"]
        for board in ("memory", "speculation")
        for panel in DASHBOARDS[board]["panels"]
        if "thresholdsStyle" in panel.get("fieldConfig", {}).get("defaults", {}).get("custom", {})
    }
    assert limits == {"More than planned": 0.1, "KV cache in use": 0.95, "Tokens a step": 1.2}


def test_what_is_provisioned_is_what_compose_mounts() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/step128.yml").read_text())["providers"]
    grafana = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["grafana"]
    mounts = {each["target"]: each for each in grafana["volumes"] if isinstance(each, dict)}
    wanted = {"/etc/grafana/provisioning": "provisioning", provider["options"]["path"]: "dashboards"}
    for target, folder in wanted.items():
        assert mounts[target]["source"] == f"./configs/grafana/{folder}" and mounts[target]["read_only"]
    prometheus = yaml.safe_load((ROOT / "configs/prometheus/prometheus.yml").read_text())
    assert source["url"] == "http://prometheus:9090" and source["isDefault"]
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    default = next(v for v in DASHBOARDS["overview"]["templating"]["list"] if v["type"] == "datasource")
    assert default["current"]["value"] == source["uid"]


def install(folder: Path) -> None:
    """Put Grafana's types and the compiler into the folder, or skip."""
    if NPM is None:
        pytest.skip("no npm here: the dashboards are not held against Grafana's published types")
    (folder / "package.json").write_text('{"private": true}')
    command = [NPM, "install", "--no-audit", "--no-fund", "--ignore-scripts"]
    result = subprocess.run(
        [*command, grafana_types.SCHEMA, grafana_types.COMPILER],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if result.returncode:
        pytest.skip(f"npm cannot fetch {grafana_types.SCHEMA}: {result.stderr.strip()[-200:]}")


def compiled(folder: Path, dashboards: dict[str, dict[str, Any]]) -> str:
    (folder / "check.ts").write_text(grafana_types.program(dashboards))
    options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler"]
    compiler = [str(folder / "node_modules/.bin/tsc"), *options, "--target", "es2022", "check.ts"]
    return subprocess.run(compiler, cwd=folder, capture_output=True, text=True, check=False, timeout=300).stdout


@pytest.mark.proof
def test_grafana_s_published_types_take_every_dashboard(tmp_path: Path, measured: Measured) -> None:
    install(tmp_path)
    started = time.monotonic()
    assert compiled(tmp_path, DASHBOARDS) == ""
    measured(f"{len(DASHBOARDS)} dashboards of {grafana_types.SCHEMA}'s types in {time.monotonic() - started:.1f} s")
    wrong = {
        "graphTooltips": lambda board: board.update(graphTooltips=1),
        "colorMod": lambda board: board["panels"][0]["options"].update(colorMod="value"),
        "rainbow": lambda board: board["panels"][0]["options"].update(colorMode="rainbow"),
    }
    for words, change in wrong.items():
        board = copy.deepcopy(DASHBOARDS["overview"])
        change(board)
        assert words in compiled(tmp_path, {"overview": board})


@pytest.mark.proof
@pytest.mark.skipif(PROGRAM is None, reason="no prometheus here (apt install prometheus)")
def test_every_query_has_an_answer(tmp_path: Path, measured: Measured) -> None:
    """In a real Prometheus over the real exporter on both boxes; what one box has not, the other has."""
    empty: dict[str, set[tuple[str, str, str]]] = {}
    for name in dashboard_feed.BOXES:
        (tmp_path / name).mkdir()
        with dashboard_feed.fed(name, tmp_path / name, str(PROGRAM)) as (prometheus, pass_seconds, box):
            box.start()
            pass_seconds(5)
            box.ready()
            pass_seconds(25)
            empty[name] = {
                each
                for each in expressions()
                if not prometheus.get("query", query=plain(each[2]).replace("[1m]", "[8s]"))["result"]
            }
            pictures = os.environ.get("STEP128_PICTURES")
            if pictures and name == dashboard_feed.BOXES[0]:
                draw(Path(pictures), prometheus, pass_seconds, box)
    shown = {name: sorted(f"{board}: {panel}" for board, panel, _ in found) for name, found in empty.items()}
    measured(f"{len(expressions())} queries; without an answer on {json.dumps(shown)}")
    never = set.intersection(*empty.values())
    assert {panel for _, panel, _ in never} <= {"Critical alerts"}, never  # none fires
    quad, strix = ({panel for _, panel, _ in empty[name]} for name in dashboard_feed.BOXES)
    assert quad - {"Critical alerts"} == {"Memory bandwidth of an APU", "Power of an APU by part"}
    assert strix - {"Critical alerts"} == {"PCIe lanes, of what the path can do", "Fan", "Power"}


def draw(folder: Path, prometheus: Any, pass_seconds: Callable[[int], None], box: Any) -> None:
    """Draw the pictures of the documentation; in a process of its own, as they need matplotlib."""
    box.throttle(1 << 36)
    pass_seconds(10)
    box.throttle(0)
    pass_seconds(14)
    command = [
        sys.executable,
        str(ROOT / "scripts/draw_dashboards.py"),
        "--prometheus",
        prometheus._url.removesuffix("/api/v1"),
    ]
    command += ["--seconds", "60", "--rate", "8s", "--about", "with made figures of a quad R9700", str(folder)]
    subprocess.run(command, check=True)
