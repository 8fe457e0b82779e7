"""Top-k KL against a reference run, by hand; and the references that cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from scripted_model import ScriptedModel

from step128_evals.cli import main
from step128_evals.perplexity.topk import divergence, pack_tops, unpack_tops

TEXT = "abcdefghijklmnopqrstuvwxy"


def model(own: float, *others: float, dialect: str = "prompt_logprobs") -> ScriptedModel:
    """Probabilities of the text's own token and of the tokens 501, 502, ... at each position."""
    beside = tuple((501 + number, math.log(probability)) for number, probability in enumerate(others))
    return ScriptedModel(dialect, logprob=lambda ids, i: math.log(own), others=beside)


def run(server: Oracle, scripted: ScriptedModel, out: str, *options: str, text: str = TEXT) -> int:
    server.respond = scripted.respond
    Path("text").write_text(text)
    arguments = ["--base-url", server.url, "--text", "text", "--context-tokens", "9", "--out", out, "--json"]
    return main(["ppl", *arguments, *options])


def compare(server: Oracle, reference: ScriptedModel, other: ScriptedModel, capsys: Any, top_k: int) -> dict[str, Any]:
    assert run(server, reference, "reference.jsonl", "--top-k", str(top_k)) == 0
    capsys.readouterr()
    assert run(server, other, "other.jsonl", "--reference", "reference.jsonl") == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


@pytest.mark.parametrize("dialect", ["prompt_logprobs", "echo"])
def test_kl_by_hand(oracle: Oracle, capsys: Any, dialect: str) -> None:
    reference = model(0.2, 0.5, 0.2, dialect=dialect)  # 0.1 is left for all other tokens
    other = model(0.3, 0.25, 0.25, dialect=dialect)  # here 0.2
    report = compare(oracle, reference, other, capsys, 2)
    # Of the likeliest two, 501 and the own token are known to both; 502 is not among the other's two. So three buckets.
    expected = 0.2 * math.log(0.2 / 0.3) + 0.5 * math.log(0.5 / 0.25) + 0.3 * math.log(0.3 / 0.45)
    kl = report["kl"]
    assert report["mean_kl"] == pytest.approx(expected, rel=1e-6)
    assert kl["mean"] == report["mean_kl"] and kl["p99"] == pytest.approx(expected, rel=1e-6)
    assert kl["same_top_token"] == 0.0 and kl["positions"] == 24  # 501 against the text's own
    assert kl["known_probability"] == pytest.approx(0.7, rel=1e-6)
    assert kl["mean_interval"] is None  # every chunk has the same: that is no certainty
    assert "lower bound" in report["kl_definition"] and "fewer for more positions" in report["kl_definition"]
    full = 0.2 * math.log(0.2 / 0.3) + 0.5 * math.log(2) + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 0.2)
    assert report["mean_kl"] < full
    Path("reference.jsonl").unlink(), Path("other.jsonl").unlink()
    assert compare(oracle, reference, other, capsys, 3)["mean_kl"] == pytest.approx(full, rel=1e-6)


def test_a_run_is_no_distance_from_itself(oracle: Oracle, capsys: Any) -> None:
    same = model(0.2, 0.5, 0.3)
    report = compare(oracle, same, same, capsys, 3)
    assert report["mean_kl"] == 0.0 and report["kl"]["same_top_token"] == 1.0
    assert report["kl"]["reference"]["base_url"] == oracle.url
    assert main(["show", "other.jsonl"]) == 0
    text = capsys.readouterr().out
    assert "mean KL 0 nats" in text and "same likeliest token at 100.00% of 24 positions" in text
    assert main(["report", "other.jsonl", "--out", "report"]) == 0
    assert "(ppl-0/kl.svg)" in Path("report/report.md").read_text()
    assert "<svg" in Path("report/ppl-0/kl.svg").read_text()


def test_positions_differ(oracle: Oracle, capsys: Any) -> None:
    """One position in 24 is far off: the mean hides it, the 99th percentile shows it."""
    reference = model(0.5, 0.5)

    def logprob(ids: list[int], i: int) -> float:
        return math.log(0.001 if ids[i] == 10 + ord("c") else 0.5)

    other = ScriptedModel(logprob=logprob, others=((501, math.log(0.5)),))
    kl = compare(oracle, reference, other, capsys, 2)["kl"]
    # The own token is known to both; what is left of the other is 0.499, though the reference leaves nothing.
    once = 0.5 * math.log(0.5 / 0.001)
    assert kl["mean"] == pytest.approx(once / 24, rel=1e-5)
    assert kl["p99"] == pytest.approx(np.quantile([0.0] * 23 + [once], 0.99), rel=1e-5)
    low, high = kl["mean_interval"].values()
    assert low == pytest.approx(0.0, abs=1e-6) and high > kl["mean"]


def test_top_k_beyond_what_the_server_allows(oracle: Oracle, capsys: Any) -> None:
    assert run(oracle, model(0.5, 0.5), "a.jsonl", "--top-k", "21") == 4
    error = capsys.readouterr().err
    assert "greater than max allowed: 20" in error and "--max-logprobs 21" in error
    assert run(oracle, model(0.5, 0.5), "a.jsonl", "--top-k", "5") == 4
    assert "only 2 come" in capsys.readouterr().err
    assert not Path("a.jsonl").exists()


def test_references_that_cannot_be(oracle: Oracle, capsys: Any) -> None:
    scripted = model(0.2, 0.5, 0.3)
    assert run(oracle, scripted, "plain.jsonl") == 0
    assert run(oracle, scripted, "reference.jsonl", "--top-k", "2") == 0

    def refused(message: str, *options: str, text: str = TEXT, reference: str = "reference.jsonl") -> None:
        capsys.readouterr()
        assert run(oracle, scripted, "other.jsonl", "--reference", reference, *options, text=text) in (65, 66)
        assert message in capsys.readouterr().err

    refused("measured without --top-k", reference="plain.jsonl")
    refused("No such file", reference="absent.jsonl")
    refused("its text_sha256 is", text=TEXT.upper())
    refused("its stride_tokens is 8, here it is 4", "--stride", "4")
    refused("its definition is 'step128', here it is 'lm-eval'", "--definition", "lm-eval")
    lines = Path("reference.jsonl").read_text().splitlines(keepends=True)
    Path("part.jsonl").write_text("".join(lines[:-1]))
    refused("lacks 1 of 3 chunks, 00002 for one", reference="part.jsonl")
    assert run(oracle, scripted, "two.jsonl", "--reference", "part.jsonl", "--max-chunks", "2") == 0
    Path("speed.jsonl").write_text(lines[0].replace('"eval": "ppl"', '"eval": "depth"'))
    refused("a result of depth, not of ppl", reference="speed.jsonl")


def test_another_tokenizer_is_no_reference(oracle: Oracle, capsys: Any) -> None:
    scripted = model(0.2, 0.5, 0.3)
    assert run(oracle, scripted, "reference.jsonl", "--top-k", "2") == 0
    text = Path("reference.jsonl").read_text()
    first = json.loads(text.splitlines()[1])
    Path("reference.jsonl").write_text(text.replace(first["data"]["tokens_sha256"], "0" * 16))
    capsys.readouterr()
    assert run(oracle, scripted, "other.jsonl", "--reference", "reference.jsonl") == 70
    assert "its chunk 00000 has other tokens" in capsys.readouterr().err


def test_names_of_tokens_must_be_of_one_kind(oracle: Oracle, capsys: Any) -> None:
    assert run(oracle, model(0.2, 0.5, 0.3, dialect="echo"), "reference.jsonl", "--top-k", "2") == 0
    capsys.readouterr()
    assert run(oracle, model(0.2, 0.5, 0.3), "other.jsonl", "--reference", "reference.jsonl") == 70
    assert "tokens by their ids, the other" in capsys.readouterr().err


def test_compared_runs_are_resumed(oracle: Oracle, capsys: Any) -> None:
    scripted = model(0.2, 0.5, 0.3)
    report = compare(oracle, scripted, scripted, capsys, 2)
    lines = Path("other.jsonl").read_text().splitlines(keepends=True)
    Path("other.jsonl").write_text("".join(lines[:2]) + lines[2][:40])  # a kill in the middle of a line
    assert run(oracle, scripted, "other.jsonl", "--reference", "reference.jsonl") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["kl"] == report["kl"] and again["perplexity"] == report["perplexity"]


@settings(deadline=None)
@given(
    st.lists(st.floats(0.001, 1.0), min_size=4, max_size=30),
    st.lists(st.floats(0.001, 1.0), min_size=30, max_size=30),
    st.integers(1, 29),
)
def test_truncation_is_a_lower_bound(first: list[float], second: list[float], kept: int) -> None:
    p = np.array(first) / sum(first)
    q = np.array(second[: len(first)]) / sum(second[: len(first)])
    full = float(np.sum(p * np.log(p / q)))
    order = np.argsort(-p)[:kept].tolist()
    bound, known = divergence({n: math.log(p[n]) for n in order}, {n: math.log(q[n]) for n in order})
    assert 0.0 <= bound <= full + 1e-5
    assert known == pytest.approx(sum(p[n] for n in order))


def test_packed_tops_are_small_and_exact() -> None:
    rng = np.random.default_rng(0)
    tops = [
        {
            int(token): float(np.float32(p))
            for token, p in zip(rng.integers(128896, size=20), -rng.random(20), strict=True)
        }
        for _ in range(500)
    ]
    packed = pack_tops(tops)
    assert unpack_tops(packed) == tops
    assert len(json.dumps(packed)) / 500 < 20 * 10  # bytes a position
    assert unpack_tops(pack_tops([{"a": -1.0, "ü": -2.0}, {}])) == [{"a": -1.0, "ü": -2.0}, {}]
