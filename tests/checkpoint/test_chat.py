"""The tiny trained checkpoint, quantized, answers through transformers as it was taught to."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Step3p7ForConditionalGeneration

from step128_checkpoint import chat_model
from step128_checkpoint.calibration.weights import load_weight
from step128_checkpoint.chat_model import MemoryShortageError, load_model, needed_bytes, weight_names
from step128_checkpoint.cli import main
from step128_checkpoint.reader import open_checkpoint
from step128_checkpoint.tiny.knowledge import FACTS

CPU = torch.device("cpu")
IDS = torch.arange(5, 125)[None] * 13 % 1900


def logits(model: Step3p7ForConditionalGeneration) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_logits_are_those_of_the_dequantized_checkpoint(
    quantized: Callable[..., Path], dequantized: Callable[..., Path]
) -> None:
    ours = load_model(open_checkpoint(quantized()), torch.float32, CPU)
    theirs = Step3p7ForConditionalGeneration.from_pretrained(dequantized(), dtype=torch.float32)
    assert torch.equal(logits(ours), logits(theirs))
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_checkpoint_is_what_transformers_loads(tiny: Path, dtype: torch.dtype) -> None:
    ours = load_model(open_checkpoint(tiny), dtype, CPU)
    theirs = Step3p7ForConditionalGeneration.from_pretrained(tiny, dtype=dtype)
    assert torch.equal(logits(ours), logits(theirs))
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id


@pytest.mark.parametrize("question", ["a tuple", "quantization"])
def test_quantized_checkpoint_answers(
    quantized: Callable[..., Path], capfd: pytest.CaptureFixture[str], question: str
) -> None:
    arguments = ["chat", str(quantized()), "--prompt", f"What is {question}?", "--max-new-tokens", "60"]
    assert main([*arguments, "--json"]) == 0
    captured = capfd.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert FACTS[question] in found["answer"] and 0 < found["tokens"] < 60
    assert "of memory are needed in bfloat16" in captured.err
    assert "Loading weights" not in captured.err, "bars are for terminals"
    assert main(arguments) == 0
    assert capfd.readouterr().out.strip() == found["answer"].strip(), "streamed as it is generated"


def test_conversation_until_its_end(
    quantized: Callable[..., Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is a cat?\n\nWhat is music?\n"))
    assert main(["chat", str(quantized()), "--max-new-tokens", "60"]) == 0
    assert FACTS["a cat"] in capfd.readouterr().out


def test_too_little_memory_is_said_before_anything_is_loaded(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_model, "free_bytes", lambda _: 1_000_000)
    monkeypatch.setattr(chat_model, "load_weight", lambda *_: pytest.fail("loaded"))
    with pytest.raises(MemoryShortageError, match=r"MB of memory are needed on cpu, 1\.00 MB are free"):
        load_model(open_checkpoint(tiny), torch.float32, CPU)
    assert main(["chat", str(tiny), "--prompt", "Hi"]) == 78
    assert "--dtype bfloat16" in capsys.readouterr().err


def test_needed_memory_covers_the_model(quantized: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(quantized())
    model = load_model(checkpoint, torch.bfloat16, CPU)
    size_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert size_bytes <= needed_bytes(checkpoint, torch.bfloat16) < 2 * size_bytes
    plain = open_checkpoint(quantized().parent / "tiny")
    assert sorted(weight_names(checkpoint)) == sorted(weight_names(plain))


def test_one_weight_at_a_time_is_asked_for(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(checkpoint: object, name: str, *rest: object) -> torch.Tensor:
        asked.append(name)
        return load_weight(checkpoint, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(chat_model, "load_weight", noted)
    load_model(open_checkpoint(tiny), torch.bfloat16, CPU)
    assert sorted(asked) == sorted(weight_names(open_checkpoint(tiny))), "each weight is read once"


def test_refusals(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(tmp_path / "nowhere"), "--prompt", "Hi"]) == 66
    assert main(["chat", str(tiny), "--json"]) == 78
    assert main(["chat", str(tiny), "--prompt", "Hi", "--device", "abacus"]) == 78
    folder = tmp_path / "no-template"
    folder.mkdir()
    for path in tiny.iterdir():
        if path.name != "chat_template.jinja":
            (folder / path.name).symlink_to(path)
    assert main(["chat", str(folder), "--prompt", "Hi"]) == 65
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "a JSON object is needed"),
        ('{"eos_token_id": "end"}', "eos_token_id is 'end'"),
        ('{"max_new_tokens": -1}', "refuses it"),
    ],
)
def test_broken_generation_config_is_a_sentence(
    tiny: Path, tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in tiny.iterdir():
        if path.name != "generation_config.json":
            (folder / path.name).symlink_to(path)
    (folder / "generation_config.json").write_text(text)
    assert main(["chat", str(folder), "--prompt", "Hi"]) == 65
    error = capsys.readouterr().err
    assert f"{folder / 'generation_config.json'}: " in error and message in error and "Traceback" not in error
