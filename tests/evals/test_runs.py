"""Result files survive kills, and refuse to mix two runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from step128_evals.errors import BadInputError, CannotWriteError, InputNotFoundError
from step128_evals.runs import Item, Manifest, open_results, read_run


def manifest(**settings: object) -> Manifest:
    return Manifest("tools", "m", "http://h", settings, {"server": "x"}, items_total=3)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    results = open_results(tmp_path / "deep/a.jsonl", manifest(seed=42, lengths=(1, 2)))
    items = [
        Item("a", "passed", data={"text": "Grüße\n\udcff"}),
        Item("b", "failed", "wrong"),
        Item("c", "error", "500"),
    ]
    for item in items:
        results.append(item)
    run = read_run(tmp_path / "deep/a.jsonl")
    assert run.manifest.settings == {"seed": 42, "lengths": [1, 2]} and run.manifest.model == "m"
    assert list(run.items) == ["a", "b", "c"] and run.items["b"] == items[1]
    assert run.missing == 1 and run.missing_words == "1 of 3 items missing"  # the error is asked again
    assert [item.id for item in run.with_status("passed", "error")] == ["a", "c"]


def test_every_cut_of_the_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    results = open_results(path, manifest())
    for id in ("a", "b"):
        results.append(Item(id, "passed", data={"long": "x" * 50}))
    content = path.read_bytes()
    head = content.index(b"\n") + 1
    for end in range(head, len(content)):
        path.write_bytes(content[:end])
        again = open_results(path, manifest())
        kept = content[head:end].count(b"\n")
        assert len(again.items) == kept
        assert again.pending(["a", "b", "c"]) == ["a", "b", "c"][kept:]
        again.append(Item("c", "failed", "late"))
        assert read_run(path).items["c"].why == "late" and len(read_run(path).items) == kept + 1


def test_an_error_is_pending_and_its_last_line_counts(tmp_path: Path) -> None:
    results = open_results(tmp_path / "a.jsonl", manifest())
    results.append(Item("a", "error", "status 500"))
    assert results.pending(["a"]) == ["a"]
    results.append(Item("a", "passed"))
    assert read_run(tmp_path / "a.jsonl").items == {"a": Item("a", "passed")}


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    open_results(path, manifest(seed=42, items=100))
    with pytest.raises(BadInputError, match=r"seed was 42 and is now 43.*--out.*--fresh"):
        open_results(path, manifest(seed=43, items=100))
    moved = replace(manifest(seed=42, items=100), endpoint={"server": "y"})
    with pytest.raises(BadInputError, match="server was 'x' and is now 'y'"):
        open_results(path, moved)
    open_results(path, manifest(seed=43, items=100), fresh=True)
    assert read_run(path).manifest.settings["seed"] == 43
    assert read_run(path.with_name("a.jsonl.old")).manifest.settings["seed"] == 42


@pytest.mark.parametrize("content", ["", "{}\n", "text\n", "[1]\n", '{"format": 1}\n'])
def test_what_is_no_result_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(BadInputError, match="is no result file"):
        read_run(path)


def test_a_newer_format(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    open_results(path, manifest())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}) + "\n")
    with pytest.raises(BadInputError, match="format 2; this release reads 1"):
        read_run(path)


def test_absent_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError):
        read_run(tmp_path / "none.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError):
        open_results(tmp_path / "file/a.jsonl", manifest())
    results = open_results(tmp_path / "a.jsonl", manifest())
    results.path.unlink()
    results.path.mkdir()
    with pytest.raises(CannotWriteError):
        results.append(Item("a", "passed"))
