"""Two runs against each other, and runs against thresholds."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import made_runs
import pytest
from made_runs import make

from step128_evals.cli import main
from step128_evals.compare.pairs import compare_runs
from step128_evals.errors import BadInputError
from step128_evals.evaluation import SUMMARIES
from step128_evals.gate.rules import read_rules

ROOT = Path(__file__).parents[2]
SUMMARIES_AS_SHIPPED = dict(SUMMARIES)
FIXED_NAMES = {"exact", "cold", "outcome"}  # of dataclasses and of tuples


@pytest.fixture(autouse=True)
def smallest_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made_runs.install(monkeypatch)
    monkeypatch.chdir(tmp_path)


def passes(passed: int, failed: int, offset: int = 0) -> dict[str, str]:
    outcomes = ["passed"] * passed + ["failed"] * failed
    outcomes = outcomes[offset:] + outcomes[:offset]
    return {str(number): outcome for number, outcome in enumerate(outcomes)}


def test_mcnemar_of_two_runs(tmp_path: Path) -> None:
    before = make(tmp_path / "a.jsonl", passes(20, 0) | {"only-before": "passed"})
    after = make(tmp_path / "b.jsonl", passes(12, 8) | {"odd": "error"})
    result = compare_runs(before, after)
    assert (result.pairs, result.unpaired, result.gained, result.lost) == (20, 1, 0, 8)
    assert result.p_value == pytest.approx(2 / 2**8)
    assert result.difference == pytest.approx(-0.4) and result.verdict == "worse" and result.ratio is None
    assert compare_runs(after, before).verdict == "better"


def test_chance_is_called_chance(tmp_path: Path) -> None:
    before, after = make(tmp_path / "a.jsonl", passes(18, 2)), make(tmp_path / "b.jsonl", passes(18, 2, offset=1))
    assert compare_runs(before, after).verdict == "cannot be told apart"


@pytest.mark.parametrize(("eval_name", "verdict"), [("tools", "better"), ("ppl", "worse")])
def test_figures_and_their_direction(tmp_path: Path, eval_name: str, verdict: str) -> None:
    before = make(tmp_path / "a.jsonl", {str(n): 1.0 + n for n in range(30)}, eval_name)
    after = make(tmp_path / "b.jsonl", {str(n): (1.1 + n / 1000) * (1.0 + n) for n in range(30)}, eval_name)
    result = compare_runs(before, after)
    assert result.ratio == pytest.approx(1.1145, abs=1e-4)  # the geometric mean of 1.1 to 1.129
    interval = result.ratio_interval
    assert interval is not None and 1.1 < interval.low < 1.1145 < interval.high < 1.129
    assert result.verdict == verdict and result.p_value < 1e-6 and result.gained is None


@pytest.mark.parametrize(("count", "verdict"), [(5, "cannot be told apart"), (6, "worse")])
def test_a_few_figures_prove_nothing(tmp_path: Path, count: int, verdict: str) -> None:
    before = make(tmp_path / "a.jsonl", {str(n): 2.0 + n for n in range(count)}, "ppl")
    after = make(tmp_path / "b.jsonl", {str(n): 2.0001 + 1.0001 * n for n in range(count)}, "ppl")
    assert compare_runs(before, after).verdict == verdict


def test_other_questions_are_refused(tmp_path: Path) -> None:
    one = make(tmp_path / "a.jsonl", passes(3, 0), seed=42)
    with pytest.raises(BadInputError, match="did not ask the same: seed is 42 and 43"):
        compare_runs(one, make(tmp_path / "b.jsonl", passes(3, 0), seed=43))
    assert compare_runs(one, make(tmp_path / "how.jsonl", passes(3, 0), seed=42, dialect="echo")).pairs == 3
    with pytest.raises(BadInputError, match="is of the eval tools"):
        compare_runs(one, make(tmp_path / "c.jsonl", passes(3, 0), "ppl", seed=42))
    with pytest.raises(BadInputError, match="no scored item in common"):
        compare_runs(one, make(tmp_path / "d.jsonl", {"other": "passed"}, seed=42))


def test_compare_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a.jsonl", passes(20, 0))
    make(tmp_path / "b.jsonl", passes(12, 8))
    assert main(["compare", "a.jsonl", "b.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "0 gained, 8 lost; McNemar's exact test: p = 0.0078" in out and "verdict: worse" in out
    assert main(["compare", "a.jsonl", "b.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lost"] == 8


def gates(tmp_path: Path, *entries: dict[str, Any]) -> str:
    path = tmp_path / "gates.yaml"
    path.write_text(json.dumps({"gates": list(entries)}))  # JSON is YAML
    return str(path)


@pytest.mark.parametrize(
    ("bound", "code"),
    [
        ({"figure": "rate", "at_least": 0.9}, 0),
        ({"figure": "rate", "at_least": 0.91}, 3),
        ({"figure": "rate", "at_most": 0.9}, 0),
        ({"figure": "rate", "at_most": 0.89}, 3),
        ({"figure": "rate", "equals": 0.9}, 0),
        ({"figure": "interval.low", "at_least": 0.69}, 0),  # Wilson of 18 of 20: 0.699
        ({"figure": "interval.low", "at_least": 0.70}, 3),
        ({"figure": "list.1", "equals": 2}, 0),
        ({"figure": "nothing", "at_least": 0}, 3),
        ({"figure": "interval", "at_least": 0}, 3),
    ],
)
def test_thresholds(tmp_path: Path, bound: dict[str, Any], code: int) -> None:
    make(tmp_path / "a.jsonl", passes(18, 2))
    assert main(["gate", gates(tmp_path, {"eval": "tools", **bound}), "a.jsonl"]) == code


def test_what_was_not_measured_does_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "partial.jsonl", passes(5, 0), total=6)
    make(tmp_path / "unsupported.jsonl", {"a": "unsupported"}, "ppl")
    rule = {"figure": "rate", "at_least": 0}
    path = gates(tmp_path, *({"eval": name, **rule} for name in ("tools", "ppl", "needle")))
    assert main(["gate", path, "partial.jsonl", "unsupported.jsonl", "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"] and {gate["outcome"] for gate in report["gates"]} == {"failed"}
    found = [gate["found"] for gate in report["gates"]]
    assert "1 of 6 items missing" in found[0] and found[1] == "unsupported: why" and "no result file" in found[2]
    path = gates(tmp_path, *({"eval": name, "optional": True, **rule} for name in ("ppl", "needle")))
    assert main(["gate", path, "unsupported.jsonl", "--json"]) == 0
    assert {gate["outcome"] for gate in json.loads(capsys.readouterr().out)["gates"]} == {"skipped"}


def test_baseline(tmp_path: Path) -> None:
    make(tmp_path / "a.jsonl", passes(20, 0))
    make(tmp_path / "b.jsonl", passes(12, 8))
    path = gates(tmp_path, {"eval": "tools", "not_worse_than_baseline": True})
    assert main(["gate", path, "b.jsonl", "--baseline", "a.jsonl"]) == 3
    assert main(["gate", path, "a.jsonl", "--baseline", "b.jsonl"]) == 0
    assert main(["gate", path, "a.jsonl"]) == 3


def test_unsupported_items_do_not_pass_unseen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a.jsonl", {"a": "passed", "b": "unsupported"})
    rule = {"eval": "tools", "figure": "rate", "at_least": 1}
    assert main(["gate", gates(tmp_path, rule), "a.jsonl", "--json"]) == 3
    assert "1 of 2 items unsupported: why" in json.loads(capsys.readouterr().out)["gates"][0]["found"]
    assert main(["gate", gates(tmp_path, {**rule, "allow_unsupported": True}), "a.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gates"][0]["found"] == "1.0 (1 of 2 items unsupported)"


def test_a_baseline_must_be_whole_and_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a.jsonl", passes(20, 0), total=536)
    make(tmp_path / "b.jsonl", passes(20, 0))
    make(tmp_path / "c.jsonl", passes(20, 0), seed=43)
    path = gates(tmp_path, {"eval": "tools", "not_worse_than_baseline": True})
    for baseline, words in (("a", "516 of 536 items missing"), ("c", "did not ask the same")):
        assert main(["gate", path, "b.jsonl", "--baseline", f"{baseline}.jsonl", "--json"]) == 3
        assert words in json.loads(capsys.readouterr().out)["gates"][0]["found"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("gates: [{eval: [ppl]}]", "'eval' must be one of"),
        ("gates: [{eval: tools, figure: rate, at_least: 1, optional: 'no'}]", "optional must be true or false"),
        ("gates: [{eval: tools, figure: rate, at_least: 1, why: [1]}]", "why must be a text"),
        ("gates: [{eval: tools, figure: rate, at_least: 1, why: 2026-13-99}]", "is no YAML"),
        ("- a", "needs a list under 'gates'"),
        ("gates: []", "needs a list under 'gates'"),
        ("gates: [", "is no YAML"),
        ("gates: [{eval: speed}]", "gate 1: 'eval' must be one of"),
        ("gates: [{eval: tools, figure: rate}]", "gate 1: a 'figure' and one of"),
        ("gates: [{eval: tools, figure: rate, at_least: 1, at_most: 2}]", "gate 1: a 'figure' and one of"),
        ("gates: [{eval: tools, figure: rate, minimum: 1}]", "'minimum' is not one of"),
        ("gates: [{eval: tools, figure: rate, at_least: much}]", "at_least must be a number"),
        ("gates: [{eval: tools, figure: rate, not_worse_than_baseline: true}]", "takes no figure"),
    ],
)
def test_bad_yaml(tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gates.yaml").write_text(content)
    make(tmp_path / "a.jsonl", passes(1, 0))
    assert main(["gate", "gates.yaml", "a.jsonl"]) == 65
    assert message in capsys.readouterr().err


def test_shipped_thresholds_name_figures_that_are_there() -> None:
    """Each rule's figure is a key in the code of its eval's summary: the names cannot drift apart unseen."""
    for rule in read_rules(ROOT / "configs/evals/release.yaml"):
        if rule.figure:
            module = importlib.import_module(SUMMARIES_AS_SHIPPED[rule.eval])
            folder = Path(str(module.__file__)).parent
            code = "".join(path.read_text() for path in folder.rglob("*.py"))
            for part in rule.figure.split("."):
                assert part.isdigit() or part in FIXED_NAMES or f'"{part}"' in code, rule


def test_two_files_of_one_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a.jsonl", passes(1, 0))
    make(tmp_path / "b.jsonl", passes(1, 0))
    make(tmp_path / "c.jsonl", passes(1, 0), "ppl")
    path = gates(tmp_path, {"eval": "ppl", "figure": "rate", "at_least": 0, "why": "[/INST] is no markup"})
    assert main(["gate", path, "a.jsonl", "b.jsonl", "c.jsonl"]) == 0  # no gate asks for the two
    assert "[/INST]" in capsys.readouterr().out
    path = gates(tmp_path, {"eval": "tools", "figure": "rate", "at_least": 0})
    assert main(["gate", path, "a.jsonl", "b.jsonl"]) == 65
    assert "are both of the eval tools" in capsys.readouterr().err


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a.jsonl", passes(18, 2), total=30)
    assert main(["show", "a.jsonl"]) == 0
    assert "rate 0.9\nitems: a.jsonl" in capsys.readouterr().out
    assert main(["show", "a.jsonl", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["eval"], report["items"], report["items_missing"]) == ("tools", 20, 10)
    make(tmp_path / "b.jsonl", {"a": "unsupported"})
    assert main(["show", "b.jsonl"]) == 4
    make(tmp_path / "c.jsonl", {"a": "passed", "b": "error"})
    assert main(["show", "c.jsonl"]) == 70


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a.jsonl", passes(18, 2), total=30, seed=42)
    assert main(["report", "a.jsonl", "--out", "out"]) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert "| Tool calls | rate 0.9 \\| of all | m | not whole: 10 of 30 items missing" in text
    assert "| Perplexity | not measured | | no result file |" in text
    assert "| 0 failed tool calls | rate 0.9 \\| of all (m) |" in text
    assert "![bars](tools-0/bars.svg) and [a link](https://example.org/x)" in text
    assert (tmp_path / "out/tools-0/bars.svg").exists() and '"seed": 42' in text
    (tmp_path / "file").write_text("")
    assert main(["report", "a.jsonl", "--out", "file"]) == 73
    (tmp_path / "odd.jsonl").write_text(
        (tmp_path / "a.jsonl").read_text().replace('"status": "passed"', '"status": "measured"')
    )
    assert main(["report", "odd.jsonl", "--out", "out"]) == 65
    assert "is missing in it" in capsys.readouterr().err
    assert (tmp_path / "out/report.md").read_text() == text  # the one before is still there
