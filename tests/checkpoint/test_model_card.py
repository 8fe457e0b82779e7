from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from step128_checkpoint.cli import main
from step128_checkpoint.model_card import is_generated

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def product(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    source = make_checkpoint()
    note = {"format": "step128-download", "repo": "someone/Step-X", "commit": "c" * 40}
    (source / "step128_download.json").write_text(json.dumps(note))
    out = tmp_path / "product"
    assert main(["quantize", str(source), str(out), "--method", "absmax"]) == 0
    return out


def card(folder: Path, *options: object) -> str:
    assert main(["model-card", str(folder), *map(str, options)]) == 0
    return (folder / "README.md").read_text()


def test_card_says_what_the_files_prove(product: Path) -> None:
    text = card(product)
    _, front, body = text.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["base_model"] == "someone/Step-X" and values["base_model_relation"] == "quantized"
    assert values["quantization"]["policy"] == "all-linears" and values["quantization"]["method"] == "absmax"
    assert {"nl4", "quantized"} <= set(values["tags"]) and "pruned" not in values["tags"]
    assert "step128-checkpoint quantize bf16 OUT --policy all-linears --method absmax" in body
    assert f"at commit `{'c' * 40}`" in body
    assert "3, 2 with 4 routed experts" in body and "MTP layers | 1 of 1" in body
    bits = json.loads(run_inspect(product))["components"][-1]["bits_per_weight"]
    assert f"{bits:.3f}" in body
    assert "The 5 worst of" in body


def run_inspect(folder: Path) -> str:
    import contextlib
    import io

    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        assert main(["inspect", str(folder), "--json"]) == 0
    return stream.getvalue()


def test_only_given_results_are_claimed(product: Path, tmp_path: Path) -> None:
    text = card(product)
    assert "- perplexity: not measured" in text and "- MTP acceptance: not measured" in text
    result = {"perplexity": 3.25, "scored_tokens": 1000, "definition": "chunks of 2048", "exit_code": 0}
    (tmp_path / "ppl.json").write_text("some progress\n" + json.dumps(result) + "\n")
    acceptance = {"acceptance": {"drafts": 7, "rates": [0.9, 0.5]}, "mean_accepted_length": 2.4}
    (tmp_path / "mtp.json").write_text(json.dumps(acceptance, indent=1))
    text = card(product, "--evals", tmp_path / "ppl.json", tmp_path / "mtp.json")
    assert "| perplexity | 3.25 |" in text and "| definition | chunks of 2048 |" in text
    assert "| MTP rates | [0.9, 0.5] |" in text and "exit code" not in text
    assert "perplexity: not measured" not in text and "MTP acceptance: not measured" not in text
    assert "- tool calls: not measured" in text
    needle = {"eval": "needle", "headline": "99 of 100 exact", "pass_rate": 0.99}
    (tmp_path / "needle.json").write_text(json.dumps(needle))
    text = card(product, "--evals", tmp_path / "needle.json")
    assert "| headline | 99 of 100 exact |" in text
    assert "(needle): not measured" not in text and "- tool calls: not measured" in text


def test_items_of_an_eval_are_no_result(product: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"eval": "needle", "format": 1}, {"id": "a", "status": "passed", "why": "", "data": {}}]
    (tmp_path / "needle.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["model-card", str(product), "--evals", str(tmp_path / "needle.jsonl")]) == 65
    assert "step128-eval show needle.jsonl --json" in capsys.readouterr().err


def test_failed_evaluation_is_no_result(product: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text(json.dumps({"error": "no server answers", "exit_code": 69}))
    assert main(["model-card", str(product), "--evals", str(tmp_path / "bad.json")]) == 65
    assert "reports a failure" in capsys.readouterr().err
    assert not (product / "README.md").exists()


def test_anothers_card_is_kept(product: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (product / "README.md").write_text("# by hand")
    assert main(["model-card", str(product)]) == 73
    assert "--force" in capsys.readouterr().err
    assert (product / "README.md").read_text() == "# by hand"
    card(product, "--force")
    assert is_generated(product / "README.md")
    card(product)  # its own it replaces without being told to
    assert not list(product.glob(".README*"))


def test_read_only_file_system_is_a_sentence(
    product: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("step128_checkpoint.model_card.write_synced", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert main(["model-card", str(product)]) == 73
    message = capsys.readouterr().err
    assert "Read-only file system" in message and "Traceback" not in message


def test_pruning_is_described(product: Path) -> None:
    report = {
        "format": "step128-pruning",
        "criterion": "reap",
        "keep": 4,
        "of": 6,
        "calibration": {"sha256": "ab", "samples": {"mixture": [{"name": "chat|x", "kind": "chat", "tokens": 900}]}},
        "super_experts": [[1, 3]],
        "kept_experts": {"1": [0, 1, 2, 3], "2": [0, 1, 2, 5]},
    }
    (product / "step128_pruning.json").write_text(json.dumps(report))
    text = card(product)
    assert (
        "4 of 6 experts of each MoE layer were kept, by reap" in text
        and "layer 1 expert 3" in text
        and "- pruned" in text
    )
    assert "calibration `ab`" in text and "| chat\\|x | chat | 900 |" in text


def test_no_card_for_a_checkpoint_with_problems(product: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((product / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (product / "config.json").write_text(json.dumps(config))
    assert main(["model-card", str(product)]) == 65
    assert "no card is written" in capsys.readouterr().err


def test_foreign_checkpoint(make_checkpoint: MakeCheckpoint) -> None:
    text = card(make_checkpoint(), "--base-model", "a/b")
    assert "Not recorded: the folder has no step128_manifest.json" in text
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "a/b"
