"""What is scored: files, standard input, and data sets in the formats that people have, all without the network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from step128_evals.errors import BadInputError
from step128_evals.files import sha256
from step128_evals.perplexity.documents import Documents, read_documents


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def read(dataset: str, field: str = "text", limit: int | None = None) -> Documents:
    return read_documents(None, dataset, field, limit)


def write_rows(path: Path, texts: list[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts)))
    return path


def test_text_file_is_one_document_as_it_is() -> None:
    Path("a.txt").write_text("one\n\ntwo\n")
    documents = read_documents("a.txt", None, "text", None)
    assert documents.texts == ("one\n\ntwo\n",) and documents.label == "a.txt"
    assert documents.sha256 == sha256("one\n\ntwo\n")


def test_rows_are_documents(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ["one", "", "two", "three"])
    assert read("a.jsonl").texts == ("one", "", "two", "three")
    assert read("a.jsonl", limit=2).texts == ("one", "")
    assert read("a.jsonl").joined("\n\n") == "one\n\n\n\ntwo\n\nthree"  # WikiText's empty lines stay
    assert read("a.jsonl").sha256 != read("a.jsonl", limit=3).sha256
    assert read("a.jsonl::train").texts == read("a.jsonl").texts
    assert read("a.jsonl").label == "a.jsonl::train"
    with pytest.raises(BadInputError, match="--documents is of --dataset"):
        read_documents("a.jsonl", None, "text", 2)


def test_formats(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"page": ["one", "two"]}), "a.parquet")
    assert read("a.parquet", "page").texts == ("one", "two")
    Path("a.csv").write_text("text,n\none,1\ntwo,2\n")
    assert read("a.csv").texts == ("one", "two")
    Path("a.md").write_text("one\ntwo\n")
    assert read("a.md").texts == ("one\ntwo\n",)
    Path("a.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    assert read("a.json").texts == ("one", "two")


def test_folder_with_splits(tmp_path: Path) -> None:
    write_rows(tmp_path / "set/train.jsonl", ["train"])
    write_rows(tmp_path / "set/test.jsonl", ["test"])
    assert read("set").texts == ("test",)
    assert read("set::train").texts == ("train",)
    with pytest.raises(BadInputError, match="no split 'dev'; there are"):
        read("set::dev")
    write_rows(tmp_path / "other/train.jsonl", ["train"])
    write_rows(tmp_path / "other/validation.jsonl", ["validation"])
    with pytest.raises(BadInputError, match="no split called test; name one of"):
        read("other")


@pytest.mark.parametrize(
    ("dataset", "field", "message"),
    [
        ("a.jsonl", "page", "no text in the field 'page'; the fields are id, text"),
        ("a.jsonl", "id", "no text in the field 'id'"),
        ("empty.jsonl", "text", "no row with a text"),
        ("broken.jsonl", "text", "cannot be loaded"),
        ("a.xyz", "text", "a local data set ends in .jsonl"),
        ("a:b:c:d", "text", "NAME:CONFIG:SPLIT"),
        ("nobody/nothing", "text", "cannot be loaded"),
    ],
)
def test_refusals(tmp_path: Path, dataset: str, field: str, message: str) -> None:
    write_rows(tmp_path / "a.jsonl", ["one"])
    write_rows(tmp_path / "empty.jsonl", ["", " "])
    Path("broken.jsonl").write_text('{"text": "one"}\n{"text": ')
    Path("a.xyz").write_text("one")
    with pytest.raises(BadInputError, match=message):
        read(dataset, field)
