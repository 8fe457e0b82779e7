"""All checks on every machine of tests/machines, and how the findings are shown."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from step128_launcher.doctor import CHECKS, Finding, any_failed, findings_document, print_findings, run_doctor
from step128_launcher.hardware import probe

MACHINES = Path(__file__).parents[2] / "machines"
QUAD, DEFAULT = "quad-r9700", "strix-halo-128-default"


def doctor(tree: str, configs_dir: Path, **options: Any) -> list[Finding]:
    root = MACHINES / tree
    arguments: dict[str, Any] = {"configs_dir": configs_dir, "model": None, "all_reduce": False, "root": root}
    environment = options.pop("environment", {})
    return run_doctor(probe(root, environment), options.pop("profile", None), environment, **(arguments | options))


@pytest.mark.parametrize("tree", sorted(path.name for path in MACHINES.iterdir() if (path / "ORIGIN").exists()))
def test_every_machine_gets_every_check_once(tree: str, configs_dir: Path) -> None:
    found = doctor(tree, configs_dir)
    assert len(found) == len(CHECKS) + 2 and len({one.check for one in found}) == len(found)
    assert all(one.evidence for one in found)


def test_broken_checkpoint_and_profile_are_findings(configs_dir: Path, tmp_path: Path) -> None:
    found = {one.check: one for one in doctor(QUAD, configs_dir, profile="none", model=tmp_path, all_reduce=True)}
    assert found["profile"].outcome == "FAIL" and "none" in found["profile"].evidence
    assert found["checkpoint"].outcome == "FAIL" and str(tmp_path) in found["checkpoint"].evidence
    assert found["chat-template"].outcome == "FAIL"
    assert found["all-reduce"].outcome == "SKIP" and "recorded" in found["all-reduce"].evidence


def test_report(configs_dir: Path) -> None:
    found = doctor(DEFAULT, configs_dir)
    document = findings_document(found)
    assert document["schema"] == 1 and len(document["findings"]) == len(found)
    assert document["warned"] == sum(one.outcome == "WARN" for one in found) > 0
    assert json.loads(json.dumps(document)) == document
    assert any_failed(found) == bool(document["failed"])
    assert any_failed([Finding("x", "FAIL", "[y]")]) and not any_failed([Finding("x", "WARN", "y")])
    console = Console(width=100, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        print_findings(console, [*found, Finding("marked", "FAIL", "[red]x[/red]", "do [this]")])
    text = captured.get()
    assert "[red]x[/red]" in text and "→ do [this]" in text
    assert "amd-ttm --set 120" in text and text.strip().splitlines()[-1].startswith("RESULT")


@pytest.mark.parametrize("name", [None, "", "auto"])
def test_the_automatic_profile(configs_dir: Path, name: str | None) -> None:
    found = {one.check: one for one in doctor(DEFAULT, configs_dir, profile=name)}
    assert found["profile"].outcome == "PASS" and found["profile"].evidence.startswith("strix-halo-128: ")


def test_what_was_not_checked_comes_last(configs_dir: Path) -> None:
    found = doctor("no-gpu", configs_dir)
    console = Console(width=100, force_terminal=False)
    with console.capture() as captured:
        print_findings(console, found)
    before, heading, after = captured.get().partition("not checked here\n")
    assert heading and "SKIP" not in before
    for one in found:
        part = after if one.outcome == "SKIP" else before
        assert f"{one.check} " in part and one.evidence in part
    assert len(findings_document(found)["findings"]) == len(found)
