"""--local: a small Llama with random weights against arithmetic by hand, and folders that cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from oracle import Oracle

from step128_evals.cli import main

CONTEXT = 16


def make_llama(folder: Path) -> Any:
    """Write a model of one layer with its tokenizer (a token a character, BOS before a text); returns the model."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    vocabulary = {"<s>": 0} | {character: number for number, character in enumerate("abcdefghijklmnop .\n", 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("a bad cab.\n" * 8)
    return tmp_path / "llama", make_llama(tmp_path / "llama")


def ppl(folder: Path, *options: str) -> int:
    return main(["ppl", "--local", str(folder), "--text", "text", "--context-tokens", str(CONTEXT), *options])


def test_against_the_arithmetic_by_hand(llama: tuple[Path, Any], capsys: Any) -> None:
    import torch

    folder, model = llama
    assert ppl(folder, "--stride", "5", "--top-k", "4", "--device", "cpu", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    ids = ["abcdefghijklmnop .\n".index(character) + 1 for character in "a bad cab.\n" * 8]
    for number, nll in enumerate(report["chunk_nll"]):
        chunk = torch.tensor([[0, *ids[5 * number : 5 * number + CONTEXT - 1]]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(chunk).logits[0].double(), -1)
        first = 11 if number else 1
        expected = -sum(logprobs[i - 1, chunk[0, i]].item() for i in range(first, CONTEXT))
        assert nll == pytest.approx(expected, abs=1e-5)
    assert report["bos_token_ids"] == [0] and report["text_tokens"] == 88
    assert report["base_url"] == f"local:{folder}" and "float32 on cpu" in report["server"]
    # Another type of number is another distribution, by a little.
    options = ("--dtype", "bfloat16", "--reference", "results/ppl.llama.jsonl", "--out", "bf16.jsonl")
    assert ppl(folder, "--stride", "5", "--device", "cpu", "--json", *options) == 0
    kl = json.loads(capsys.readouterr().out)["kl"]
    assert 1e-7 < kl["mean"] < 1e-2 and kl["same_top_token"] > 0.8


def test_bos_token_is_the_prefix_of_lm_eval(llama: tuple[Path, Any], capsys: Any) -> None:
    assert ppl(llama[0], "--definition", "lm-eval", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prefix_token_id"] == 0


def test_what_cannot_be_loaded(llama: tuple[Path, Any], capsys: Any) -> None:
    folder, _ = llama

    def refused(code: int, message: str, *options: str) -> None:
        assert ppl(folder, *options) == code
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error

    refused(65, "--context-tokens 32 or less", "--context-tokens", "33")
    refused(78, "cannot go to the device", "--device", "nonsense")
    config = json.loads((folder / "config.json").read_text())
    # A model with one layer more: what the file lacks would be filled with random numbers.
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    refused(65, "missing keys: model.layers.1")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    refused(65, "transformers cannot load it")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "nl4"}}))
    refused(65, "step128-checkpoint dequantize")
    (folder / "config.json").write_text("{")
    refused(65, "not JSON")
    (folder / "config.json").unlink()
    refused(66, "No such file")
    folder = folder / "absent"
    refused(66, "no such folder")


def test_no_endpoint_is_asked(llama: tuple[Path, Any], oracle: Oracle, tmp_path: Path) -> None:
    Path("text").write_text("a bad cab.\n" * 8)
    assert ppl(llama[0], "--base-url", oracle.url) == 0
    assert not oracle.requests
