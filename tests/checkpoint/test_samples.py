"""Building a sample set from what is on every machine, and reading it back: shape, sides, repeats, and damage."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerFast

from step128_checkpoint.calibration.building import cli
from step128_checkpoint.calibration.building.build import build_samples
from step128_checkpoint.calibration.building.conversations import conversations
from step128_checkpoint.calibration.building.mixture import Mixture, Part, load_mixture
from step128_checkpoint.calibration.samples import SampleSet, open_samples
from step128_checkpoint.errors import CheckpointError, ConfigurationError, InputNotFoundError, OutputError

TOKENS = 512
KINDS = {"code", "text", "chat", "tools", "long", "images", "multi_image"}


@pytest.fixture(scope="module")
def samples(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleSet:
    """64 samples of the default mixture."""
    out = tmp_path_factory.mktemp("built") / "set"
    return build_samples(load_mixture(), tokenizer, out, samples=64, tokens_per_sample=TOKENS, seed=1)


@pytest.fixture(scope="module")
def texts(samples: SampleSet, tokenizer: Path) -> dict[str, list[str]]:
    """Decoded samples by kind, special tokens written out."""
    decoder = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    kinds = {part.name: part.kind for part in samples.mixture}
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for i in range(len(samples)):
        found[kinds[samples.domain(i)]].append(decoder.decode(samples.token_ids(i).tolist()))
    return found


def test_default_mixture_is_drawn_by_weight(samples: SampleSet) -> None:
    assert len(samples) == 64
    assert {part.kind for part in samples.mixture} == KINDS
    total = sum(part.weight for part in samples.mixture)
    for part in samples.mixture:
        assert abs(part.samples - 64 * part.weight / total) < 1
        assert part.samples == part.wanted
        own = [i for i in range(len(samples)) if samples.domain(i) == part.name]
        assert part.tokens == int(samples.lengths[own].sum())
        assert part.held_out == int(samples.held_out[own].sum()) == max(1, round(len(own) / 16)) * (len(own) > 1)
        assert part.images == sum(len(samples.images(i)) for i in own)
        assert part.images == 0 or part.kind in ("images", "multi_image")
    assert sum(part.tokens for part in samples.mixture) == samples.total_tokens == int(samples.lengths.sum())


def test_lengths(samples: SampleSet) -> None:
    kinds = {part.name: part.kind for part in samples.mixture}
    for i, length in enumerate(samples.lengths):
        kind = kinds[samples.domain(i)]
        if kind in ("images", "multi_image"):
            assert 171 < length <= TOKENS  # never cut, so rarely full
        else:
            assert length == TOKENS * (4 if kind == "long" else 1)


def test_pictures_and_placeholders_belong_together(samples: SampleSet, tokenizer: Path) -> None:
    vocabulary = PreTrainedTokenizerFast.from_pretrained(tokenizer).get_vocab()
    several = 0
    for i in range(len(samples)):
        ids, paths = samples.token_ids(i), samples.images(i)
        assert np.count_nonzero(ids == vocabulary["<im_start>"]) == len(paths)
        crops = np.count_nonzero(ids == vocabulary["<patch_start>"])
        assert np.count_nonzero(ids == vocabulary["<im_patch>"]) == 169 * len(paths) + 81 * crops
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
        several += len(paths) > 1
    assert several
    assert len(set(samples.folder.glob("images/*"))) == sum(part.images for part in samples.mixture)


def test_tool_calls_are_in_steps_format(texts: dict[str, list[str]]) -> None:
    joined = "\n".join(texts["tools"])
    for markup in ("<tools>", "<tool_call>\n<function=", "<parameter=", "</tool_call>", "<tool_response>", "<think>"):
        assert joined.count(markup) > 5, markup
    # Several calls in one turn, and many tools.
    assert "</tool_call>\n<tool_call>" in joined
    assert len({line.split(">")[0] for line in joined.split("<function=")[1:]}) > 8


def test_conversations_are_varied(texts: dict[str, list[str]]) -> None:
    joined = "\n".join(texts["chat"])
    turns = joined.split("<|im_start|>")[1:]
    assert len(turns) > 40
    assert len(set(turns)) > 0.8 * len(turns)  # "Thanks!" may repeat
    assert "```python" in joined
    generated = islice(conversations(random.Random(0)), 300)
    written = "".join(str(message["content"]) for document in generated for message in document.messages)
    assert sum(0x4E00 <= ord(character) < 0xA000 for character in written) > 100  # Chinese and Japanese
    assert sum(0x400 <= ord(character) < 0x500 for character in written) > 100  # Russian


def test_nothing_repeats_and_no_held_out_file_is_calibrated_on(samples: SampleSet, texts: dict[str, list[str]]) -> None:
    hashes = {samples.token_ids(i).tobytes() for i in range(len(samples))}
    assert len(hashes) == len(samples)
    # Windows of one file are on one side: no held-out code sample shares a long line with a calibration sample's file.
    held_out, calibrated = [], []
    for i in range(len(samples)):
        if samples.domain(i) == "code":
            (held_out if samples.held_out[i] else calibrated).append(bytes(samples.token_ids(i)))
    assert held_out
    assert not any(window[: 64 * 4] in other for window in held_out for other in calibrated)


def test_same_seed_same_bytes(samples: SampleSet, tokenizer: Path, tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    mixture = load_mixture()
    again = build_samples(mixture, tokenizer, tmp_path / "again", samples=64, tokens_per_sample=TOKENS, seed=1)
    assert content(again.folder) == content(samples.folder)
    assert again.sha256 == samples.sha256
    text_only = mixture.without_images()
    other = build_samples(text_only, tokenizer, tmp_path / "other", samples=16, tokens_per_sample=TOKENS, seed=2)
    mine = {samples.token_ids(i).tobytes() for i in range(len(samples))}
    assert not mine & {other.token_ids(i).tobytes() for i in range(len(other))}


def test_a_prefix_stands_for_the_whole(samples: SampleSet) -> None:
    """The first quarter holds most parts: a pilot takes only so many."""
    assert len({samples.domain(i) for i in range(16)}) >= 5


Damage = Callable[[Path, dict], None]


def rehash(folder: Path, document: dict, **tensors: np.ndarray) -> None:
    path = folder / "token_ids.safetensors"
    save_file({**load_file(path), **tensors}, path)
    document["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()


DAMAGES: dict[str, tuple[Damage, str]] = {
    "changed ids": (
        lambda folder, d: save_file(
            {**load_file(folder / "token_ids.safetensors"), "token_ids": np.zeros(5, np.int32)},
            folder / "token_ids.safetensors",
        ),
        "changed since the samples were made",
    ),
    "starts fall": (
        lambda folder, d: rehash(
            folder, d, starts=np.sort(load_file(folder / "token_ids.safetensors")["starts"])[::-1].copy()
        ),
        "starts must ascend from 0",
    ),
    "id too large": (
        lambda folder, d: rehash(
            folder, d, token_ids=load_file(folder / "token_ids.safetensors")["token_ids"] + np.int32(5000)
        ),
        "outside the vocabulary of 2048",
    ),
    "wrong type": (
        lambda folder, d: rehash(
            folder, d, token_ids=load_file(folder / "token_ids.safetensors")["token_ids"].astype(np.int64)
        ),
        "token_ids I32",
    ),
    "sample missing": (lambda folder, d: d["samples"].pop(), "65 starts for 63 samples"),
    "unknown part": (lambda folder, d: d["samples"][0].update(part=9), "does not have"),
    "key missing": (lambda folder, d: d.pop("vocabulary"), "damaged"),
    "outside": (lambda folder, d: d["files"].update({"../x": "0"}), "outside the folder"),
    "other version": (lambda folder, d: d.update(format_version=2), "not a sample set of format"),
    "picture swapped": (
        lambda folder, d: (folder / "images/000000.png").write_bytes(b"other"),
        "000000.png: changed since",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage: str, samples: SampleSet, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(samples.folder, folder)
    document = json.loads((folder / "samples.json").read_text())
    change, message = DAMAGES[damage]
    change(folder, document)
    (folder / "samples.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        open_samples(folder)


def test_missing_files(samples: SampleSet, tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match=r"holds no samples\.json"):
        open_samples(tmp_path)
    folder = tmp_path / "set"
    shutil.copytree(samples.folder, folder)
    (folder / "images/000001.png").unlink()
    with pytest.raises(InputNotFoundError, match=r"000001\.png"):
        open_samples(folder)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["samples", *arguments])
    return int(parsed.run(parsed))


def test_command(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "set")
    options = ["--tokenizer", str(tokenizer), "--samples", "12", "--tokens", "128", "--no-images", "--json"]
    assert run(out, *options) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["samples"] == 12
    assert document["shortfalls"] == []
    assert abs(sum(part["share_of_tokens"] for part in document["mixture"]) - 1) < 1e-3
    assert not {"images", "multi_image"} & {part["kind"] for part in document["mixture"]}
    assert document["sha256"] == open_samples(tmp_path / "set").sha256
    assert run("--show", out) == 0
    shown = capsys.readouterr().out
    assert "conversations" in shown
    assert document["sha256"] in shown
    with pytest.raises(OutputError, match="exists already"):
        run(out, *options)
    with pytest.raises(ConfigurationError, match="--tokenizer DIR is needed"):
        run(str(tmp_path / "other"))
    with pytest.raises(InputNotFoundError, match=r"no tokenizer\.json"):
        run(str(tmp_path / "other"), "--tokenizer", str(tmp_path))
    for option, value in (("--samples", "0"), ("--seed", "-1")):
        with pytest.raises(SystemExit):
            run(str(tmp_path / "other"), "--tokenizer", str(tokenizer), option, value)


def test_interrupted_build_leaves_nothing(tokenizer: Path, tmp_path: Path) -> None:
    count = 0

    def interrupt() -> None:
        nonlocal count
        count += 1
        if count == 5:
            assert [path.name for path in (tmp_path / "new").iterdir()] == [f".set.{os.getpid()}.partial"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_samples(load_mixture(), tokenizer, tmp_path / "new" / "set", 64, TOKENS, 0, interrupt)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_build_left_is_removed_by_the_next(tokenizer: Path, tmp_path: Path) -> None:
    """Of this output, and of processes that are gone (this one's number a restarted container may have had before)."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = [f".set.{gone.pid}.partial", f".set.{os.getpid()}.partial"]
    others = [f".set.{os.getppid()}.partial", f".sett.{gone.pid}.partial", ".set.mine.partial"]
    for name in left + others:
        (tmp_path / name / "images").mkdir(parents=True)
    build_samples(CHAT, tokenizer, tmp_path / "set", samples=2, tokens_per_sample=TOKENS)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "set"])


CHAT = Mixture("chat", (Part("c", "chat", "builtin:conversations", 1),))
TOOLS = Mixture("tools", (Part("t", "tools", "builtin:tool-calls", 1),))
PICTURES = Mixture("pictures", (Part("p", "images", "builtin:pictures", 1),))


def test_templates_that_cannot(tokenizer: Path, tmp_path: Path) -> None:
    """No template, one without tools, one without pictures, no config: each is said, and nothing is written."""
    folder, out = tmp_path / "tokenizer", tmp_path / "new" / "set"
    shutil.copytree(tokenizer, folder)

    def refused(mixture: Mixture, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            build_samples(mixture, folder, out, samples=4, tokens_per_sample=TOKENS)
        assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]

    template = folder / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    refused(TOOLS, "leaves out tools")
    refused(PICTURES, "writes 0 times <im_patch> for the 1 pictures")
    template.write_text("{{ raise_exception('roles must alternate') }}")
    refused(CHAT, "roles must alternate")
    template.unlink()
    refused(CHAT, "no chat template")
    shutil.copy(tokenizer / "chat_template.jinja", template)
    (folder / "config.json").write_text("{}")
    refused(PICTURES, "the model has no vision")
    (folder / "config.json").unlink()
    refused(PICTURES, r"no config\.json")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        build_samples(CHAT, folder, out, samples=4, tokens_per_sample=TOKENS)
