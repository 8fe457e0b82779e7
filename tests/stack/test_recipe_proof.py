"""The whole recipe on the tiny trained model, over several calibration seeds, in one table with paired intervals.

bf16 -> pruned (REAP, frequency, random; 3 and 8 of 16 experts dropped) -> NL4 (absmax, mse, importance, gptq) -> FP8 KV
cache (scale 1, calibrated scales), each on held-out text against the model that it was made of; then served by vLLM,
with the drafts' acceptance before and after. What comes out in another order than expected is printed as such.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from recipe_steps import Figures, Recipe

SEEDS = range(5)
STUDENT_T = 2.776  # 97.5th percentile with 4 degrees of freedom: half-width of a 95 % interval over 5 seeds
SAMPLES, TOKENS = 96, 512
WINDOW, WINDOWS = 512, 16
CRITERIA = ("reap", "frequency", "ean", "random")
KEPT = {13: "19 % dropped", 8: "50 % dropped"}
METHODS = ("absmax", "mse", "importance", "gptq")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval."""
    return statistics.fmean(values), STUDENT_T * statistics.stdev(values) / math.sqrt(len(values))


def paired(worse: Sequence[float], better: Sequence[float]) -> str:
    """How much larger one is than the other on the same seeds, and whether that can be told from chance."""
    mean, half = interval([a - b for a, b in zip(worse, better, strict=True)])
    verdict = "as expected" if mean > half else "REVERSED" if mean < -half else "cannot be told apart"
    return f"{mean:+.5f} ± {half:.5f} nats: {verdict}"


@pytest.fixture(scope="module")
def table(tiny: Path, tmp_path_factory: pytest.TempPathFactory, cli: Callable[..., Any]) -> dict[str, list[Any]]:
    """Every variant's figures by seed; the folders of the products under ``product``."""
    found: dict[str, list[Any]] = {}
    for seed in SEEDS:
        recipe = Recipe(tiny, tmp_path_factory.mktemp(f"seed-{seed}"), cli, WINDOW, WINDOWS)
        samples = recipe.samples(seed, SAMPLES, TOKENS)
        whole = recipe.calibrate(tiny, samples)
        dropped: dict[str, Path] = {}
        for keep, share in KEPT.items():
            for criterion in CRITERIA:
                options = ("--seed", str(seed)) if criterion == "random" else ()
                dropped[f"{criterion}, {share}"] = recipe.prune(whole, keep, criterion, *options)
        pruned = dropped[f"reap, {KEPT[13]}"]
        calibration = recipe.calibrate(pruned, samples, "--hessians")
        packed = {f"NL4 {method}": recipe.quantize(pruned, calibration, method) for method in METHODS}
        last = packed["NL4 gptq"]
        rows = recipe.evaluate(dropped) | recipe.evaluate(packed, against=pruned)
        for kind in ("fp8-unit", "fp8"):
            rows |= recipe.evaluate({f"NL4 gptq, KV {kind}": last}, kind, against=last)
        rows["all of it"] = recipe.evaluate({"all of it": last}, "fp8")["all of it"]
        for name, figures in rows.items():
            found.setdefault(name, []).append(figures)
        found.setdefault("bf16", []).append(recipe.reference)
        found.setdefault("product", []).append(last)
    return found


@pytest.mark.proof
def test_table_over_calibration_seeds(table: dict[str, list[Any]], measured: Callable[[str], None]) -> None:
    rows: dict[str, list[Figures]] = {name: figures for name, figures in table.items() if name != "product"}
    measured(f"recipe on the tiny model, {len(SEEDS)} calibration seeds, {WINDOWS} windows of {WINDOW} of each text:")
    for name, figures in rows.items():
        columns = [interval([getattr(row, key) for row in figures]) for key in ("perplexity", "code_kl", "dialogue_kl")]
        perplexity, code, dialogue = (f"{mean:.5f} ± {half:.5f}" for mean, half in columns)
        measured(f"  {name:30} perplexity {perplexity}, KL of code {code}, of dialogues {dialogue}")
    pairs = [(f"{other}, {share}", f"reap, {share}") for share in KEPT.values() for other in CRITERIA[1:]]
    pairs += [(f"NL4 {worse}", f"NL4 {better}") for worse, better in itertools.pairwise(METHODS)]
    pairs.append(("NL4 gptq, KV fp8-unit", "NL4 gptq, KV fp8"))
    for worse, better in pairs:
        for key in ("code_kl", "dialogue_kl"):
            text = paired(*([getattr(row, key) for row in rows[name]] for name in (worse, better)))
            measured(f"  {worse} - {better}, {key.removesuffix('_kl')}: {text}")
    # Without these orders NL4's search would be worth nothing; how criteria of pruning compare is only reported.
    for worse, better in (("NL4 absmax", "NL4 mse"), ("NL4 absmax", "NL4 importance"), ("NL4 importance", "NL4 gptq")):
        differences = [a.code_kl - b.code_kl for a, b in zip(rows[worse], rows[better], strict=True)]
        assert interval(differences)[0] > 0, (worse, better)


@pytest.mark.proof
def test_product_served_by_vllm(
    table: dict[str, list[Any]],
    tiny: Path,
    offline_vllm: Callable[..., dict[str, Any]],
    measured: Callable[[str], None],
) -> None:
    from step128_checkpoint.tiny.reference import held_out_tokens

    product = table["product"][0]
    tokens = held_out_tokens(tiny, 40_000).tolist()
    prompts = [tokens[start : start + 128] for start in range(0, 24_000, 1500)]
    drafting = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 3}}
    for name, folder, dtype in (("bf16", tiny, "auto"), ("pruned, NL4, FP8 KV cache", product, "fp8")):
        engine = {"model": folder, "kv_cache_dtype": dtype, "dtype": "bfloat16"}
        result = offline_vllm(engine=engine | drafting, prompts=prompts, max_tokens=64)
        assert result["returncode"] == 0, result["log"][-4000:]
        rates = " / ".join(f"{rate:.3f}" for rate in result["acceptance"])
        measured(f"served by vLLM, {name}: MTP acceptance {rates} over {result['drafts']:.0f} drafts")
        assert 0.3 < result["acceptance"][0] < 1.0
    windows = [tokens[start : start + WINDOW] for start in range(0, 8 * WINDOW, WINDOW)]
    served = offline_vllm(engine={"model": product, "dtype": "float32"}, score=windows)
    assert served["returncode"] == 0, served["log"][-4000:]
    perplexity = table["NL4 gptq"][0].perplexity
    measured(f"served by vLLM in float32: perplexity {served['perplexity']:.4f} on {len(windows)} windows")
    assert json.loads((product / "config.json").read_text())["text_config"]["moe_num_experts"] == 13
    assert served["perplexity"] < 1.2 * perplexity  # other windows of the same text: they differ by a few percent
