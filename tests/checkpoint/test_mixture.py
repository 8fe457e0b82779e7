"""Mixture files, and documents from folders: what is read, and the sentence for all that is wrong."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from mixture_texts import decoded, words
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from step128_checkpoint.calibration.building import packing, sources
from step128_checkpoint.calibration.building.build import build_samples
from step128_checkpoint.calibration.building.cli import shortfalls
from step128_checkpoint.calibration.building.documents import Document
from step128_checkpoint.calibration.building.mixture import KINDS, Mixture, Part, load_mixture
from step128_checkpoint.calibration.building.sources import open_source
from step128_checkpoint.errors import CheckpointError, ConfigurationError, InputNotFoundError
from step128_checkpoint.policy import configs_folder
from step128_checkpoint.tiny.tokenizer import BEGIN

VALID = {"name": "a", "kind": "text", "source": "folder:x", "weight": 1}
BAD_PARTS: dict[str, tuple[object, str]] = {
    "no mapping": ("text", "part 1 must be a mapping"),
    "unknown key": (VALID | {"wieght": 1}, "unknown key 'wieght'"),
    "no weight": ({k: v for k, v in VALID.items() if k != "weight"}, "weight is missing"),
    "zero weight": (VALID | {"weight": 0}, "weight must be a number above 0"),
    "true weight": (VALID | {"weight": True}, "weight must be a number above 0"),
    "kind": (VALID | {"kind": "poem"}, "kind 'poem' is unknown. Known: text, code"),
    "source": (VALID | {"source": "ftp:x"}, "must be builtin:NAME, folder:PATH or hf:DATASET"),
    "empty source": (VALID | {"source": "folder:"}, "must be builtin:NAME"),
    "factor": (VALID | {"length_factor": 0}, "length_factor must be a whole number"),
    "name": (VALID | {"name": 3}, "name must be text"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_bad_part_is_named(case: str, tmp_path: Path) -> None:
    part, message = BAD_PARTS[case]
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"format": "step128-mixture", "format_version": 1, "parts": [part]}))
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_mixture(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parts: [", "not valid YAML"),
        ("parts: []", "format: step128-mixture"),
        ("format: step128-mixture\nformat_version: 2\nparts: []", "format_version: 1"),
        ("format: step128-mixture\nformat_version: 1\nparts: []", "at least one part"),
        (f"format: step128-mixture\nformat_version: 1\nparts: [{VALID}, {VALID}]", "two parts are named 'a'"),
    ],
)
def test_bad_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        load_mixture(str(path))


def test_shipped_mixtures() -> None:
    names = sorted(path.stem for path in (configs_folder() / "calibration").glob("*.yaml"))
    assert names == ["hub", "offline"]
    offline, hub = map(load_mixture, ("offline", "hub"))
    assert {part.scheme for part in offline.parts} == {"builtin"}
    assert {part.kind for part in offline.parts} == set(KINDS)
    assert {part.scheme for part in hub.parts} == {"builtin", "hf"}
    with pytest.raises(ConfigurationError, match="Shipped are: hub, offline"):
        load_mixture("ofline")


def test_quotas_add_up() -> None:
    mixture = Mixture("m", tuple(Part(str(i), "text", "folder:x", weight) for i, weight in enumerate((3, 1, 1, 0.01))))
    for samples in (1, 2, 7, 100, 3072):
        quotas = mixture.quotas(samples)
        assert sum(quotas) == samples
        assert all(
            abs(quota - samples * part.weight / 5.01) < 1 for quota, part in zip(quotas, mixture.parts, strict=True)
        )


def test_folder_of_texts(tokenizer: Path, tmp_path: Path) -> None:
    """Long files give windows, short ones are packed; hidden files and other kinds are left alone."""
    folder = tmp_path / "notes"
    (folder / "below").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "long.md").write_text(words(1, 4000))
    for i in range(40):
        (folder / "below" / f"{i}.txt").write_text(f"note {i}: {words(100 + i, 20)}")
    (folder / "same.txt").write_text(f"note 0: {words(100, 20)}")  # an exact repeat
    (folder / ".git" / "hidden.txt").write_text("HIDDEN " * 500)
    (folder / "code.py").write_text("CODE " * 500)
    mixture = Mixture("m", (Part("notes", "text", f"folder:{folder}", 1),))
    samples = build_samples(mixture, tokenizer, tmp_path / "set", samples=12, tokens_per_sample=256)
    texts = decoded(samples, tokenizer)
    joined = "\n".join(texts)
    assert "HIDDEN" not in joined
    assert "CODE" not in joined
    assert joined.count(f"note 0: {words(100, 5)}") <= 1
    windows = [text for text in texts if "note" not in text]
    assert 1 <= len(windows) <= 4
    assert all(text in words(1, 4000) for text in windows)
    assert any("\n\nnote" in text for text in texts)  # packed, apart from each other
    assert int(samples.held_out.sum()) == 1


def test_a_source_that_runs_dry_is_made_up_for_and_said(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "many").mkdir()
    (tmp_path / "few" / "one.txt").write_text(words(1, 300))
    for i in range(60):
        (tmp_path / "many" / f"{i}.txt").write_text(words(1000 + i, 200))
    parts = (
        Part("few", "text", f"folder:{tmp_path / 'few'}", 1),
        Part("many", "text", f"folder:{tmp_path / 'many'}", 1),
    )
    samples = build_samples(Mixture("m", parts), tokenizer, tmp_path / "set", samples=40, tokens_per_sample=256)
    few, many = samples.mixture
    assert (few.wanted, many.wanted) == (20, 20)
    assert 2 <= few.samples <= 4
    assert few.samples + many.samples == len(samples) == 40
    assert few.held_out == 1  # all windows of its one file are on one side; the last is moved over
    (sentence,) = shortfalls(samples)
    assert f"part 'few' gave {few.samples} of 20 samples" in sentence
    # Nobody can make up for the last one: fewer samples, and both say so.
    fewer = build_samples(Mixture("m", parts[:1]), tokenizer, tmp_path / "fewer", samples=40, tokens_per_sample=256)
    assert len(fewer) == few.samples
    assert shortfalls(fewer)


def test_generators_that_only_repeat_end(tokenizer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def same(rng: random.Random, tokens: int) -> Iterator[Document]:
        while True:
            yield Document("same", text=f"only {rng.randrange(3)} " + "of these words " * 30)

    monkeypatch.setitem(sources._BUILTIN, "same", {"text": same})
    monkeypatch.setattr(packing, "_GIVE_UP_AFTER", 50)
    mixture = Mixture("m", (Part("p", "text", "builtin:same", 1),))
    samples = build_samples(mixture, tokenizer, tmp_path / "set", samples=100, tokens_per_sample=16)
    assert 1 < len(samples) <= 12
    assert shortfalls(samples)


def test_long_files_are_cut_once_each(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"file {i} begins {words(i, 3000)}")
    (folder / "short.txt").write_text(words(99, 20))
    mixture = Mixture("m", (Part("long", "long", f"folder:{folder}", 1, length_factor=8),))
    samples = build_samples(mixture, tokenizer, tmp_path / "set", samples=6, tokens_per_sample=128)
    assert samples.lengths.tolist() == [1024] * 6
    assert {text.split(" begins")[0] for text in decoded(samples, tokenizer)} == {f"file {i}" for i in range(6)}


def test_begin_token_is_where_a_server_puts_it(tokenizer: Path, tmp_path: Path) -> None:
    """Before a text, if the tokenizer puts one there; not within one, and not before what a chat template wrote."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, folder)
    changed = Tokenizer.from_file(str(folder / "tokenizer.json"))
    changed.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    changed.save(str(folder / "tokenizer.json"))
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i}.txt").write_text(words(i, 30 if i % 2 else 300))
    parts = (
        Part("text", "text", f"folder:{tmp_path / 'texts'}", 1),
        Part("chat", "chat", "builtin:conversations", 1),
    )
    samples = build_samples(Mixture("m", parts), folder, tmp_path / "set", samples=12, tokens_per_sample=256)
    for i in range(len(samples)):
        ids = samples.token_ids(i)
        assert np.flatnonzero(ids == 0).tolist() == ([0] if samples.domain(i) == "text" else [])
        assert len(ids) == 256


def make_pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    noise = np.random.default_rng(0)
    for i in range(count):
        image = Image.fromarray(noise.integers(0, 256, (60 + i, 80, 3), dtype=np.uint8))
        image.save(folder / f"{i}.{'jpg' if i % 2 else 'png'}")
        (folder / f"{i}.txt").write_text(f"caption number {i:02}")


@pytest.mark.parametrize("kind", ["images", "multi_image"])
def test_folder_of_pictures(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 12)
    mixture = Mixture("m", (Part("p", kind, f"folder:{tmp_path / 'pictures'}", 1),))
    samples = build_samples(mixture, tokenizer, tmp_path / "set", samples=3, tokens_per_sample=1024)
    for i, text in enumerate(decoded(samples, tokenizer)):
        assert text.count("<im_patch>") == 169 * len(samples.images(i)) > 0
        assert text.count("caption number") == len(samples.images(i))
        sizes = [Image.open(path).size[1] - 60 for path in samples.images(i)]
        positions = [text.index(f"caption number {number:02}") for number in sizes]
        assert positions == sorted(positions)  # pictures are in the order of their captions
        assert ("1. caption" in text) == (kind == "multi_image")


FOLDERS: dict[str, tuple[Callable[[Path], object], str, type[CheckpointError], str]] = {
    "missing": (lambda folder: None, "text", InputNotFoundError, "part 'p': no such folder"),
    "empty": (lambda folder: folder.mkdir(), "code", InputNotFoundError, "holds no file for kind code"),
    "no caption": (
        lambda folder: (make_pictures(folder, 2), (folder / "1.txt").unlink()),
        "images",
        CheckpointError,
        "1.jpg: no caption beside it",
    ),
    "broken picture": (
        lambda folder: (make_pictures(folder, 2), (folder / "0.png").write_bytes(b"\x89PNG nothing")),
        "images",
        CheckpointError,
        "0.png: not a picture",
    ),
    "cut picture": (
        lambda folder: (
            make_pictures(folder, 2),
            (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:900]),
        ),
        "images",
        CheckpointError,
        "1.jpg: not a picture",
    ),
    "nothing fits": (
        lambda folder: (folder.mkdir(), (folder / "a.txt").write_text("")),
        "text",
        CheckpointError,
        "not one sample was made",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_folder_is_named(case: str, tokenizer: Path, tmp_path: Path) -> None:
    make, kind, error, message = FOLDERS[case]
    make(tmp_path / "in")
    mixture = Mixture("m", (Part("p", kind, f"folder:{tmp_path / 'in'}", 1),))
    with pytest.raises(error, match=message):
        build_samples(mixture, tokenizer, tmp_path / "set", samples=4, tokens_per_sample=512)
    assert not list(tmp_path.glob("*set*"))


def test_unknown_builtin_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"no builtin source 'novels'. There are: conversations, pictures"):
        open_source(Part("p", "text", "builtin:novels", 1), 0, 128)
    with pytest.raises(ConfigurationError, match="builtin:pictures is of kind images or multi_image, not text"):
        open_source(Part("p", "text", "builtin:pictures", 1), 0, 128)
