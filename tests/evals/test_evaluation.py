"""One run from tasks to report: what is kept, what is printed, and the exit code."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

import made_runs
import pytest

from step128_evals.errors import EvalError, UnsupportedError
from step128_evals.evaluation import Evaluation, run_evaluation
from step128_evals.harness import Task
from step128_evals.options import Result, counts
from step128_evals.probe import Endpoint
from step128_evals.runs import Item, read_run

ENDPOINT = Endpoint("http://h", "a server", "org/model:1", 100, {})


@pytest.fixture(autouse=True)
def smallest_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made_runs.install(monkeypatch)
    monkeypatch.chdir(tmp_path)


def evaluate(outcomes: dict[str, Item | EvalError], **options: object) -> Result:
    def task(id: str, outcome: Item | EvalError) -> Task:
        async def ask() -> Item:
            if isinstance(outcome, EvalError):
                raise outcome
            return outcome

        return Task(id, ask)

    parsed = argparse.Namespace(**({"out": None, "fresh": False, "concurrency": 2, "json": False} | options))
    tasks = [task(id, outcome) for id, outcome in outcomes.items()]
    return asyncio.run(run_evaluation(parsed, ENDPOINT, Evaluation(made_runs.NAME, "items", {"seed": 42}, tasks)))


def test_a_whole_run(capsys: pytest.CaptureFixture[str]) -> None:
    report, code = evaluate({"a": Item("a", "passed"), "b": Item("b", "failed", "wrong")})
    assert code == 0
    assert (report["rate"], report["items"], report["errors"], report["items_missing"]) == (0.5, 2, 0, 0)
    assert report["headline"] == "rate 0.5 | of all" and report["results"] == "results/tools.org_model_1.jsonl"
    assert capsys.readouterr().out == "rate 0.5\nitems: results/tools.org_model_1.jsonl\n"
    manifest = read_run(Path("results/tools.org_model_1.jsonl")).manifest
    assert manifest.items_total == 2 and manifest.settings == {"seed": 42} and manifest.endpoint["server"] == "a server"


def test_errors_are_kept_apart_and_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    report, code = evaluate({"a": Item("a", "passed"), "b": EvalError("status 500")})
    assert (code, report["rate"], report["errors"], report["items_missing"]) == (70, 1.0, 1, 1)
    assert "1 of 2 items ended in an error, the first: status 500" in capsys.readouterr().err
    report, code = evaluate({"a": Item("a", "failed"), "b": Item("b", "passed")}, json=True)
    assert (code, report["rate"], report["items_missing"]) == (0, 1.0, 0)  # a was not asked twice
    shown = capsys.readouterr()
    assert "1 of 2 items are in" in shown.err and "only the others are asked" in shown.err and shown.out == ""
    evaluate({"a": Item("a", "passed"), "b": Item("b", "passed")})
    assert "since 20" in (err := capsys.readouterr().err) and "nothing is asked now; --fresh asks all anew" in err


def test_nothing_supported() -> None:
    report, code = evaluate({"a": UnsupportedError("no images"), "b": UnsupportedError("no images")})
    assert code == 4 and report["unsupported"] == "no images"
    assert json.dumps(report)


def test_numbers_of_options() -> None:
    assert counts("0,8k,200K,5") == [0, 8192, 204800, 5]
    for wrong in ("", "8,", "-1", "k", "1.5"):
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            counts(wrong)
