"""The rules: proper PromQL over metrics that exist, each alert drilled by promtool, each with its runbook."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "configs/prometheus"
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
Rule = Any  # a class of conftest.py, which a test cannot import
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None,
    reason="no promtool here (apt install prometheus, or the image prom/prometheus); syntax is checked",
)
SUFFIXES = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
FROM_PROMETHEUS = {"up": {"job", "instance", "server"}}
# Labels that Prometheus adds to everything it scrapes here (prometheus.yml).
ADDED = {"job", "instance", "server"}


def promtool(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [str(PROMTOOL), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=300)


def selectors(expr: str) -> list[Any]:
    """The vector selectors of an expression; it raises ValueError if it is not PromQL."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expr), visit)
    return found


def vllm_names() -> dict[str, str]:
    """Scraped name -> name as vLLM gives it."""
    lines = (ROOT / "tests/monitoring/vllm_0_32_metrics.txt").read_text().splitlines()
    pairs = [line.split() for line in lines if not line.startswith("#")]
    return {f"{name}{suffix}": name for kind, name in pairs for suffix in SUFFIXES[kind]}


def alerts(rules: list[Rule]) -> list[Rule]:
    return [rule for rule in rules if rule.alert]


def cases() -> list[dict[str, Any]]:
    return [test for path in TESTS for test in yaml.safe_load(path.read_text())["tests"]]


def test_the_rules_are_promql(rules: list[Rule]) -> None:
    """Also on a machine without promtool."""
    assert len(alerts(rules)) == 20
    for rule in rules:
        assert selectors(rule.expr), rule.name
    with pytest.raises(ValueError, match="parenthesis"):
        selectors("sum(up")


def test_every_metric_exists_with_its_labels(rules: list[Rule], exported: dict[str, set[str]]) -> None:
    """In what the exporter really says, in vLLM's list, or recorded by a rule."""
    recorded = {rule.name for rule in rules if not rule.alert}
    vllm = vllm_names()
    for rule in rules:
        for selector in selectors(rule.expr):
            name = selector.name
            assert name in exported or name in vllm or name in recorded or name in FROM_PROMETHEUS, (rule.name, name)
            labels = exported.get(name, FROM_PROMETHEUS.get(name))
            for matcher in selector.matchers.matchers if labels is not None else ():
                assert matcher.name in labels | ADDED, (rule.name, name, matcher.name)


def test_every_recorded_figure_is_of_a_metric(rules: list[Rule]) -> None:
    names = [rule.name for rule in rules]
    assert len(names) == len(set(names))
    for rule in rules:
        wanted = r"Step128[A-Z][A-Za-z]+" if rule.alert else r"step128:[a-z0-9_]+:[a-z0-9_]+"
        assert re.fullmatch(wanted, rule.name), rule.name


@pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM in this environment to compare the list with")
def test_the_list_of_vllm_s_metrics_is_the_installed_vllm_s() -> None:
    spec = find_spec("vllm")
    folder = Path(str(spec.origin)).parent if spec else Path()
    sources = "".join(path.read_text() for path in sorted((folder / "v1").rglob("*.py")))
    missing = {name for name in vllm_names().values() if f'"{name}"' not in sources}
    assert not missing


def test_every_alert_says_what_to_do(rules: list[Rule]) -> None:
    headings = set(re.findall(r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE))
    for rule in alerts(rules):
        notes = rule.alert["annotations"]
        assert rule.alert["labels"]["severity"] in {"critical", "warning", "info"}
        assert set(notes) == {"summary", "description", "runbook"}
        assert "$labels.server" in notes["summary"] and len(notes["summary"]) < 140
        assert len(notes["description"]) > 150, rule.name
        assert notes["runbook"] == f"docs/runbook.md#{rule.name.lower()}"
    assert {rule.name for rule in alerts(rules)} == {name for name in headings if name.startswith("Step128")}


def test_every_alert_has_a_firing_and_a_quiet_case(rules: list[Rule]) -> None:
    for rule in alerts(rules):
        asked = [
            question
            for case in cases()
            if re.match(rf"{rule.name}(,|$)", case["name"])
            for question in case["promql_expr_test"]
            if "ALERTS" in question["expr"]
        ]
        fired = [sample for question in asked for sample in question["exp_samples"] if rule.name in sample["labels"]]
        assert fired and any(not question["exp_samples"] for question in asked), rule.name


@needs_promtool
def test_promtool_takes_the_configuration() -> None:
    result = promtool("check", "config", "--syntax-only", PROMETHEUS / "prometheus.yml")
    assert result.returncode == 0, result.stderr
    result = promtool("check", "rules", *sorted((PROMETHEUS / "rules").glob("*.yml")))
    assert result.returncode == 0, result.stderr


@needs_promtool
def test_promtool_finds_no_fault_in_our_metrics(scraped: dict[str, str]) -> None:
    """Names, units, types and help of everything the exporter says; vLLM's own names would not pass."""
    for text in scraped.values():
        result = promtool("check", "metrics", stdin=text)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert promtool("check", "metrics", stdin="# TYPE step128_bad_total gauge\nstep128_bad_total 1\n").returncode


@needs_promtool
@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_promtool_runs_the_drills(path: Path) -> None:
    result = promtool("test", "rules", path)
    assert result.returncode == 0, result.stdout + result.stderr


@needs_promtool
def test_the_drills_can_fail(tmp_path: Path) -> None:
    """With the rules' limits moved, the same drills are red."""
    for folder in ("rules", "tests"):
        shutil.copytree(PROMETHEUS / folder, tmp_path / folder)
    path = tmp_path / "rules/requests.yml"
    path.write_text(path.read_text().replace("step128:kv_cache_usage:ratio > 0.95", "step128:kv_cache_usage:ratio > 1"))
    result = promtool("test", "rules", tmp_path / "tests/requests.yml")
    assert result.returncode != 0 and "Step128KvCacheFull" in result.stdout + result.stderr


@needs_promtool
def test_every_text_is_filled_in(rules: list[Rule], tmp_path: Path) -> None:
    """promtool prints the alerts that it got where none is expected; no label in their texts may be empty."""
    shutil.copytree(PROMETHEUS / "rules", tmp_path / "rules")
    (tmp_path / "tests").mkdir()
    printed = ""
    for path in TESTS:
        document = yaml.safe_load(path.read_text())
        for case in document["tests"]:
            times = [
                q["eval_time"]
                for q in case["promql_expr_test"]
                if any("Step128" in s["labels"] for s in q["exp_samples"])
            ]
            name = case["name"].partition(",")[0]
            case["alert_rule_test"] = [{"alertname": name, "eval_time": time, "exp_alerts": []} for time in times]
        (tmp_path / "tests" / path.name).write_text(yaml.safe_dump(document, allow_unicode=True))
        result = promtool("test", "rules", tmp_path / "tests" / path.name)
        printed += result.stdout + result.stderr
    for rule in alerts(rules):
        for key in ("summary", "description"):
            parts = re.split(r"{{.*?}}", " ".join(rule.alert["annotations"][key].split()))
            pattern = r"(\S[^\n]{0,60}?)".join(map(re.escape, parts))
            assert re.search(pattern, printed.replace('\\"', '"')), (rule.name, key)


def test_prometheus_scrapes_what_compose_names() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    targets = {name: job["static_configs"][0]["targets"] for name, job in jobs.items()}
    assert targets == {"step128": ["serve:9128"], "vllm": ["serve:8000"], "prometheus": ["localhost:9090"]}
    assert jobs["vllm"]["authorization"] == {"type": "Bearer", "credentials_file": "/run/secrets/metrics_token"}
    labels = {name: job["static_configs"][0].get("labels") for name, job in jobs.items()}
    assert labels["step128"] == labels["vllm"] == {"server": "serve"}
