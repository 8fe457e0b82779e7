"""Evaluation layer by layer, held against transformers' whole model on the trained tiny checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, DynamicCache, Step3p7ForConditionalGeneration

from step128_checkpoint.calibration.layers import load_weight
from step128_checkpoint.calibration.samples import SamplePart, SampleSet
from step128_checkpoint.cli import main
from step128_checkpoint.errors import CheckpointError, ConfigurationError
from step128_checkpoint.evaluation import memory
from step128_checkpoint.evaluation.blockwise import (
    EvaluationOptions,
    Subject,
    compare,
    evaluate,
    final_states,
    work_tokens,
)
from step128_checkpoint.evaluation.kv_cache import round_to_fp8
from step128_checkpoint.evaluation.windows import Windows, sample_windows, text_windows, token_windows
from step128_checkpoint.reader import Checkpoint, open_checkpoint
from step128_checkpoint.tiny.corpus import held_out_text

# Of unequal length: more than the sliding window of 128, and short ones that are padded in a batch with others.
LENGTHS = (300, 300, 40, 129, 77)
OPTIONS = EvaluationOptions(batch_tokens=700)


@pytest.fixture(scope="module")
def windows(tiny: Path) -> Windows:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer.encode(held_out_text()[:6000], add_special_tokens=False)
    starts = np.cumsum((0, *LENGTHS))
    return token_windows([ids[a:b] for a, b in pairwise(starts)], "for a test")


@pytest.fixture(scope="module")
def whole(tiny: Path) -> Step3p7ForConditionalGeneration:
    return Step3p7ForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32).eval()


def ids_of(windows: Windows, number: int) -> torch.Tensor:
    return torch.from_numpy(windows.samples.token_ids(number).astype(np.int64))[None]


def logits_of(model: Step3p7ForConditionalGeneration, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits[0]
    return found


def blockwise_logits(folder: Path, windows: Windows, options: EvaluationOptions = OPTIONS) -> dict[int, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    states = final_states(Subject(checkpoint, options), windows)
    with checkpoint:
        head = load_weight(checkpoint, "lm_head.weight", torch.float32, "cpu")
    return {number: F.linear(rows, head) for number, rows in states.items()}


def test_logits_and_perplexity_are_those_of_the_whole_model(
    tiny: Path, whole: Step3p7ForConditionalGeneration, windows: Windows
) -> None:
    ours = blockwise_logits(tiny, windows)
    nll = []
    for number in windows.numbers:
        ids = ids_of(windows, number)
        theirs = logits_of(whole, ids)
        # Padding and batching change the order of float32 sums only.
        assert float((ours[number] - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())
        nll.append(float(F.cross_entropy(theirs[:-1], ids[0, 1:], reduction="sum")))
    found = evaluate(open_checkpoint(tiny), windows, OPTIONS)
    assert found.scored_tokens == sum(LENGTHS) - len(LENGTHS)
    assert found.window_scored == tuple(length - 1 for length in LENGTHS)
    assert found.window_nll == pytest.approx(nll, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(nll) / found.scored_tokens), rel=1e-5)


def test_quantized_checkpoint_equals_its_dequantized_twin(
    quantized: Callable[..., Path], dequantized: Callable[..., Path], windows: Windows
) -> None:
    packed, plain = (evaluate(open_checkpoint(f), windows, OPTIONS) for f in (quantized(), dequantized()))
    assert packed.window_nll == plain.window_nll


def test_divergence_from_itself_is_none(tiny: Path, windows: Windows) -> None:
    subject = Subject(open_checkpoint(tiny), OPTIONS)
    reference, (same,) = compare(subject, [subject], windows)
    assert same.mean_kl == 0 and same.top1_agreement == 1
    assert same.evaluation.window_nll == reference.window_nll


def test_divergence_is_the_definition(
    quantized: Callable[..., Path], tiny: Path, whole: Step3p7ForConditionalGeneration, windows: Windows
) -> None:
    subjects = [Subject(open_checkpoint(quantized(method=method)), OPTIONS) for method in ("mse", "absmax")]
    reference, found = compare(Subject(open_checkpoint(tiny), OPTIONS), subjects, windows)
    for comparison, method in zip(found, ("mse", "absmax"), strict=True):
        ours = blockwise_logits(quantized(method=method), windows)
        kl, same = 0.0, 0
        for number in windows.numbers:
            p = logits_of(whole, ids_of(windows, number))[:-1].double().log_softmax(-1)
            q = ours[number][:-1].double().log_softmax(-1)
            kl += float(F.kl_div(q, p, reduction="sum", log_target=True))
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
        # float32 log-probabilities against float64 ones, summed over 2048 tokens
        assert comparison.mean_kl == pytest.approx(kl / reference.scored_tokens, rel=1e-3)
        assert comparison.top1_agreement == same / reference.scored_tokens
    assert 0 < found[0].mean_kl < found[1].mean_kl, "mse is nearer to the original than absmax"


class RoundedCache(DynamicCache):
    """transformers' own cache, with the same rounding written down a second time."""

    scales: dict[int, tuple[float, float]]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *rest: Any, **names: Any) -> Any:
        rounded = []
        for tensor, scale in zip((key, value), self.scales[layer], strict=True):
            codes = torch.clamp(tensor / scale, min=-448, max=448).to(torch.float8_e4m3fn)
            rounded.append(codes.to(torch.float32) * scale)
        return super().update(*rounded, layer, *rest, **names)


def kv_scales(folder: Path) -> dict[int, tuple[float, float]]:
    with open_checkpoint(folder) as checkpoint:
        names = [[f"model.layers.{i}.self_attn.{p}_proj.{p}_scale" for p in "kv"] for i in range(9)]
        read = [[float(np.frombuffer(checkpoint.read(name), "<f4")[0]) for name in pair] for pair in names]
    return {layer: (k, v) for layer, (k, v) in enumerate(read)}


@pytest.mark.parametrize("kind", ["fp8", "fp8-unit"])
def test_fp8_cache_rounds_as_a_real_cache_would(
    tiny: Path, whole: Step3p7ForConditionalGeneration, windows: Windows, kind: Any
) -> None:
    scales = kv_scales(tiny) if kind == "fp8" else dict.fromkeys(range(9), (1.0, 1.0))
    options = EvaluationOptions(kind, batch_tokens=700)
    ours = blockwise_logits(tiny, windows, options)
    plain = blockwise_logits(tiny, windows)
    for number in windows.numbers:
        cache = RoundedCache(config=whole.config.text_config)
        cache.scales = scales
        theirs = logits_of(whole, ids_of(windows, number), cache)
        # A sum in another order may move a value over a rounding boundary of e4m3: small beside the rounding itself.
        difference = float((ours[number] - theirs).abs().mean())
        assert difference < 1e-3 * float((plain[number] - theirs).abs().mean())


def test_fp8_rounding() -> None:
    values = torch.tensor([1.0, 1.06, 1.07, 448.0, 500.0, -1e9, 0.0])
    assert round_to_fp8(values, 1.0).tolist() == [1.0, 1.0, 1.125, 448.0, 448.0, -448.0, 0.0]
    assert round_to_fp8(values[:3], 0.5).tolist() == [1.0, 1.0, 1.125]
    assert float(round_to_fp8(torch.tensor([500.0]), 2.0)) == 512.0, "496 and 512 are tied; the even one is taken"
    assert round_to_fp8(values.bfloat16(), 1.0).dtype == torch.bfloat16


def test_fp8_needs_scales(tiny: Path, windows: Windows) -> None:
    checkpoint = open_checkpoint(tiny)
    bare = {name: t for name, t in checkpoint.tensors.items() if not name.endswith(("k_scale", "v_scale"))}
    with pytest.raises(CheckpointError, match=r"no usable K scale .*fp8-unit"):
        evaluate(Checkpoint(tiny, checkpoint.config, bare), windows, EvaluationOptions("fp8"))
    evaluate(Checkpoint(tiny, checkpoint.config, bare), windows, EvaluationOptions("fp8-unit"))


def test_windows_of_a_text(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    text = held_out_text()[:8000]
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = text_windows(tokenizer, text, 256)
    assert len(found.numbers) == len(ids) // 256 and "stride 256" in found.definition and "no BOS" in found.definition
    assert np.concatenate([found.samples.token_ids(i) for i in found.numbers]).tolist() == ids[: len(ids) // 256 * 256]
    assert len(text_windows(tokenizer, text, 256, max_tokens=600).numbers) == 2
    short = text_windows(tokenizer, "def main():", 256)
    assert len(short.numbers) == 1
    with pytest.raises(ConfigurationError, match="window of 1 tokens"):
        text_windows(tokenizer, text, 1)
    with pytest.raises(CheckpointError, match="too few"):
        text_windows(tokenizer, "", 256)

    class WithBos:
        def encode(self, text: str, add_special_tokens: bool, **_: Any) -> list[int]:
            return [99] * add_special_tokens + [ord(letter) for letter in text]

    found = text_windows(WithBos(), "abcdefgh", 4)
    assert [found.samples.token_ids(i).tolist() for i in found.numbers] == [[99, 97, 98, 99], [99, 100, 101, 102]]
    assert "BOS [99]" in found.definition


def test_windows_of_samples_take_held_out_ones_of_every_part() -> None:
    part = SamplePart("", "text", "", 1, 4, 4, 40, 2, 0)
    mixture = tuple(SamplePart(**{**part.__dict__, "name": name}) for name in ("chat", "code"))
    document = {"samples": [{"part": n // 4, "held_out": n % 2 == 0, "images": []} for n in range(8)], "seed": 0}
    held_out = np.arange(8) % 2 == 0
    starts = np.arange(0, 90, 10)
    ids = np.arange(80, dtype=np.int32)
    samples = SampleSet(Path("set"), document, mixture, "f" * 64, held_out, ids, starts)
    assert sample_windows(samples, held_out=True).numbers == (0, 4, 2, 6)
    assert sample_windows(samples, held_out=True, max_tokens=20).numbers == (0, 4)
    assert len(sample_windows(samples, held_out=False).numbers) == 8
    targets, scored = sample_windows(samples, True).targets(4, image_token_id=45)
    assert targets.tolist() == list(range(41, 50)) and (~scored).nonzero().flatten().tolist() == [4]


def test_command(
    tiny: Path, quantized: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(held_out_text()[:8000])
    arguments = ["perplexity", str(quantized()), "--text", str(text), "--window", "256", "--tokens", "1024"]
    assert main([*arguments, "--reference", str(tiny), "--kv-cache", "fp8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["windows"] == 4 and found["scored_tokens"] == 4 * 255 and found["kv_cache"] == "fp8"
    assert 0 < found["mean_kl"] < 0.1 and 0.8 < found["top1_agreement"] < 1
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=0.05)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed and "definition: text tokenized once" in printed and "reference" not in printed
    assert main([*arguments, "--held-out"]) == 78
    assert main(["perplexity", str(tiny), "--text", str(tmp_path / "nothing.txt")]) == 66
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny.iterdir():
        (other / path.name).symlink_to(path)
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.json").write_text("{}")
    assert main([*arguments, "--reference", str(other)]) == 78


def test_memory_is_checked_first(tiny: Path, windows: Windows, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(open_checkpoint(tiny), OPTIONS)
    memory.check_memory(subject, windows, 2)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000)
    with pytest.raises(ConfigurationError, match=r"are needed on cpu, 1\.00 kB are free: .* states of 846 tokens"):
        memory.check_memory(subject, windows, 2)


def test_progress_adds_up(tiny: Path, windows: Windows) -> None:
    done: list[int] = []
    checkpoint = open_checkpoint(tiny)
    evaluate(checkpoint, windows, OPTIONS, done.append)
    assert sum(done) == work_tokens(checkpoint, windows) == 9 * sum(LENGTHS)


def test_nan_is_no_perplexity(tiny: Path, windows: Windows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "step128_checkpoint.evaluation.blockwise.run_layer", lambda layer, number, hidden, cache: hidden * math.nan
    )
    with pytest.raises(CheckpointError, match="gives NaN"):
        evaluate(open_checkpoint(tiny), windows, OPTIONS)
