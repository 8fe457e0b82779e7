"""Exact perplexities of a scripted model, in every definition, dialect and stride; and what cannot be measured."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, Reply
from scripted_model import BOS, NATS, ScriptedModel, ids_of

from step128_evals.cli import main
from step128_evals.errors import BadInputError
from step128_evals.perplexity import cut_chunks
from step128_evals.perplexity.windows import lm_eval_windows, step128_windows, text_pieces

TEXT = "abcdefghijklmnopqrstuvwxy"  # 25 tokens


def run(server: Oracle, model: ScriptedModel, *options: str, text: str = TEXT) -> int:
    server.respond = model.respond
    Path("text").write_text(text)
    return main(["ppl", "--base-url", server.url, "--text", "text", *options])


def measure(server: Oracle, model: ScriptedModel, capsys: Any, *options: str, text: str = TEXT) -> dict[str, Any]:
    capsys.readouterr()
    assert run(server, model, *options, "--json", text=text) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def prompts(server: Oracle) -> list[Any]:
    """Of the scoring requests, as token ids; the probe's are texts."""
    return [body["prompt"] for _, body in server.requests if isinstance(body.get("prompt"), list)]


def nats(*indices: int) -> float:
    return NATS * sum(indices)


@pytest.mark.parametrize("dialect", ["prompt_logprobs", "echo"])
@pytest.mark.parametrize("concurrency", ["1", "3"])
def test_with_bos(oracle: Oracle, capsys: Any, dialect: str, concurrency: str) -> None:
    model = ScriptedModel(dialect)
    report = measure(oracle, model, capsys, "--context-tokens", "9", "--concurrency", concurrency)
    assert report["bos_token_ids"] == [BOS] and report["dialect"] == dialect
    assert report["chunk_positions"] == [8, 8, 8]  # 25 tokens, 8 a chunk beside BOS, one token dropped
    assert report["chunk_nll"] == [nats(*range(1, 9))] * 3
    assert report["nll_per_token"] == nats(*range(1, 9)) / 8
    assert report["perplexity"] == math.exp(report["nll_per_token"])
    assert "BOS [1]" in report["definition"] and report["text"] == "text" and report["text_tokens"] == 25
    assert report["scored_tokens"] == 24 and report["complete"]
    assert sorted(prompts(oracle)) == sorted([BOS, *ids_of(TEXT[start : start + 8])] for start in (0, 8, 16))


def test_without_bos_from_standard_input(oracle: Oracle, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle.respond = ScriptedModel(bos=False).respond
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a" * 40)))
    options = ["--text", "-", "--context-tokens", "10", "--max-chunks", "2"]
    assert main(["ppl", "--base-url", oracle.url, *options]) == 0
    out = capsys.readouterr().out
    assert f"perplexity {math.exp(nats(*range(1, 10)) / 9):.4f}" in out
    assert "18 scored tokens in 2 chunks" in out
    assert "first token of each chunk is not scored" in out
    assert "3.9352" in out and "names no corpus" in out


@pytest.mark.parametrize(
    ("bos", "context", "first", "later"),
    [(True, 9, range(1, 9), range(5, 9)), (False, 8, range(1, 8), range(4, 8))],
)
def test_stride_scores_only_new_tokens(
    oracle: Oracle, capsys: Any, bos: bool, context: int, first: range, later: range
) -> None:
    options = ("--context-tokens", str(context), "--stride", "4")
    report = measure(oracle, ScriptedModel(bos=bos), capsys, *options)
    # Chunks of 8 text tokens begin at 0, 4, 8, 12 and 16; 24 of the 25 tokens are held.
    assert report["chunk_nll"] == [nats(*first), *[nats(*later)] * 4]
    assert report["chunk_positions"] == [len(first), 4, 4, 4, 4]
    assert report["stride_tokens"] == 4 and "one every 4 tokens" in report["definition"]


@pytest.mark.parametrize("bos", [True, False])
def test_llama_cpps_definition(oracle: Oracle, capsys: Any, bos: bool) -> None:
    options = ("--context-tokens", "8", "--definition", "llama.cpp")
    report = measure(oracle, ScriptedModel(bos=bos), capsys, *options)
    # 25 or 26 tokens: three chunks; logits 4 to 6 are used, which predict the tokens 5, 6 and 7.
    assert report["chunk_nll"] == [nats(5, 6, 7)] * 3 and report["chunk_positions"] == [3, 3, 3]
    assert "3 tokens of each" in report["definition"] and "perplexity.cpp" in report["definition_source"]
    stream = [BOS, *ids_of(TEXT)] if bos else ids_of(TEXT)
    expected = [stream[start : start + 8] for start in (0, 8, 16)]
    if bos:  # the first token of each chunk is replaced, so the text's tokens 7 and 15 are lost
        expected = [[BOS, *chunk[1:]] for chunk in expected]
    assert prompts(oracle) == expected


def test_lm_evals_definition(oracle: Oracle, capsys: Any) -> None:
    Path("documents.jsonl").write_text("\n".join(json.dumps({"page": text}) for text in ("ab cd\néf", " ", "x")))
    oracle.respond = ScriptedModel().respond
    options = ["--dataset", "documents.jsonl", "--field", "page", "--definition", "lm-eval", "--context-tokens", "4"]
    assert main(["ppl", "--base-url", oracle.url, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    # 8 tokens: windows of three predictions, 3 + 3 + 2; the last has one more token of context.
    first, second = ids_of("ab cd\néf"), ids_of("x")
    assert prompts(oracle) == [[BOS, *first[:3]], first[2:6], first[4:8], [BOS, *second]]
    assert report["chunk_nll"] == [nats(1, 2, 3), nats(1, 2, 3), nats(2, 3), nats(1)]
    assert report["chunk_positions"] == [3, 3, 2, 1]
    total = nats(1, 2, 3, 1, 2, 3, 2, 3, 1)
    assert report["words"] == 4 and report["bytes"] == 10  # é has two
    assert report["word_perplexity"] == pytest.approx(math.exp(total / 4))
    assert report["byte_perplexity"] == pytest.approx(math.exp(total / 10))
    assert report["bits_per_byte"] == pytest.approx(total / 10 / math.log(2))
    assert report["prefix_token_id"] == BOS and "each token is scored once" in report["definition"]
    assert "nothing but white space left out" in report["definition"]
    low, high = report["byte_perplexity_interval"].values()
    assert low < report["byte_perplexity"] < high


def test_prefix_token_of_lm_eval_can_be_named(oracle: Oracle, capsys: Any) -> None:
    model, options = ScriptedModel(bos=False), ("--definition", "lm-eval", "--context-tokens", "30")
    assert run(oracle, model, *options) == 65
    assert "--prefix-token" in capsys.readouterr().err
    assert run(oracle, model, *options, "--prefix-token", "no") == 65
    assert "is 2 tokens, not one" in capsys.readouterr().err
    assert measure(oracle, model, capsys, *options, "--prefix-token", "Z")["prefix_token_id"] == 10 + ord("Z")
    report = measure(oracle, model, capsys, *options, "--prefix-token", "2", "--fresh")
    assert report["prefix_token_id"] == 2 and report["chunk_nll"] == [nats(*range(1, 26))]


def test_endpoint_without_tokenizer_gets_pieces_of_text(oracle: Oracle, capsys: Any) -> None:
    model = ScriptedModel("echo", tokenizer=False)
    text = "aaa bbb ccc ddd eee fff"
    report = measure(oracle, model, capsys, "--context-tokens", "11", text=text)
    # 23 characters are 24 tokens with the BOS that this server puts; pieces are a tenth shorter than would fit.
    assert report["text_tokens"] is None and "cut into pieces of 8 characters" in report["definition"]
    pieces = ["aaa bbb", " ccc ddd", " eee fff"]
    assert [body["prompt"] for _, body in oracle.requests if body.get("echo")][-3:] == pieces
    assert report["chunk_nll"] == [nats(*range(1, len(piece) + 1)) for piece in pieces]
    for options in (("--definition", "llama.cpp"), ("--definition", "lm-eval"), ("--stride", "4")):
        assert run(oracle, model, "--context-tokens", "11", *options, text=text) == 4
        assert "has no tokenizer" in capsys.readouterr().err


def test_endpoint_without_prompt_logprobs_is_unsupported(oracle: Oracle, capsys: Any) -> None:
    assert run(oracle, ScriptedModel(None), "--context-tokens", "10") == 4
    assert "has no prompt logprobs" in capsys.readouterr().err
    assert not Path("results").exists()


def test_run_goes_on_after_a_cut(oracle: Oracle, capsys: Any) -> None:
    model = ScriptedModel()
    model.fail = lambda ids: Reply("worn out", status=500) if ids[1] >= 10 + ord("i") else None
    assert run(oracle, model, "--context-tokens", "5", "--json") == 70
    assert "stopped after" not in capsys.readouterr().err  # four of six chunks failed, one less than ends a run
    model.fail = lambda ids: None
    oracle.requests.clear()
    report = measure(oracle, model, capsys, "--context-tokens", "5")
    assert [ids[1] - 10 for ids in prompts(oracle)] == [ord(character) for character in "imqu"]
    assert report["chunk_nll"] == [nats(1, 2, 3, 4)] * 6
    assert run(oracle, model, "--context-tokens", "6") == 65
    assert "context_tokens was 5 and is now 6" in capsys.readouterr().err


def test_one_chunks_error_leaves_the_others(oracle: Oracle, capsys: Any) -> None:
    model = ScriptedModel(logprob=lambda ids, i: None if ids[i] == 10 + ord("k") else -NATS * i)
    assert run(oracle, model, "--context-tokens", "9", "--json") == 70
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert "no log-probability (None) for token 3" in captured.err
    assert report["errors"] == 1 and not report["complete"] and report["chunks"] == 2
    assert report["chunk_nll"] == [nats(*range(1, 9))] * 2
    assert main(["show", "results/ppl.oracle.jsonl"]) == 70
    assert "PARTIAL: 2 of 3 chunks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(raw="{broken"), "does not follow the API"),
        (Reply(body={"choices": [{"prompt_logprobs": [None]}]}), "1 prompt log-probabilities for 9 tokens"),
        (Reply(body={"choices": [{"prompt_logprobs": None}]}), "0 prompt log-probabilities for 9 tokens"),
        (Reply(body={"choices": []}), "does not follow the API"),
        (Reply(body={"choices": [{"prompt_logprobs": [None] + [{"x": 1}] * 8}]}), "does not follow the API"),
        (Reply(body={"choices": [{"text": "x"}]}, cut_after=1), "no answer from"),
    ],
)
def test_bad_answers(oracle: Oracle, capsys: Any, reply: Reply, message: str) -> None:
    model = ScriptedModel(fail=lambda ids: reply if ids[1] == 10 + ord("i") else None)
    assert run(oracle, model, "--context-tokens", "9") == 70
    captured = capsys.readouterr()
    assert message in captured.err and "PARTIAL: 2 of 3 chunks" in captured.out


def test_echo_that_is_too_short(oracle: Oracle, capsys: Any) -> None:
    reply = Reply(body={"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [None], "top_logprobs": None}}]})
    model = ScriptedModel("echo", fail=lambda ids: reply if ids[1] == 10 + ord("i") else None)
    assert run(oracle, model, "--context-tokens", "9") == 70
    assert "1 log-probabilities for 9 tokens" in capsys.readouterr().err


def test_refusals(oracle: Oracle, capsys: Any) -> None:
    oracle.context_tokens = 64
    model = ScriptedModel()
    assert main(["ppl", "--base-url", oracle.url, "--text", "absent"]) == 66
    assert "No such file" in capsys.readouterr().err
    Path("bytes").write_bytes(b"\xff\xfe\xff")
    assert main(["ppl", "--base-url", oracle.url, "--text", "bytes"]) == 65
    capsys.readouterr()
    for options, message in [
        (("--context-tokens", "64"), "--context-tokens 63 or less"),
        (("--context-tokens", "9", "--stride", "9"), "leaves gaps"),
        (("--context-tokens", "20", "--definition", "llama.cpp"), "--context-tokens 13 or less"),
        (("--context-tokens", "9", "--definition", "llama.cpp", "--stride", "3"), "--stride is of the definition"),
        (("--context-tokens", "9", "--definition", "lm-eval", "--max-chunks", "1"), "whole documents"),
        (("--context-tokens", "9", "--prefix-token", "1"), "of the definition lm-eval"),
    ]:
        assert run(oracle, model, *options) == 65
        assert message in capsys.readouterr().err
    for arguments in (["ppl"], ["ppl", "--text", "a", "--dataset", "b"], ["ppl", "--text", "a", "--top-k", "1001"]):
        with pytest.raises(SystemExit) as usage:
            main(arguments)
        assert usage.value.code == 2


def test_unexpected_group_of_errors_is_reported(oracle: Oracle, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise OverflowError("odd")

    monkeypatch.setattr("step128_evals.perplexity.endpoint.EndpointScorer.score", fail)
    assert run(oracle, ScriptedModel(), "--context-tokens", "9", "--json") == 1
    assert "internal error" in json.loads(capsys.readouterr().out)["error"]


def test_interval_holds_the_figure(oracle: Oracle, capsys: Any) -> None:
    model = ScriptedModel(logprob=lambda ids, i: -0.01 * (ids[i] % 7))
    report = measure(oracle, model, capsys, "--context-tokens", "6")
    low, high = report["perplexity_interval"].values()
    assert low < report["perplexity"] < high
    one = measure(oracle, model, capsys, "--context-tokens", "6", "--max-chunks", "1", "--fresh")
    assert one["perplexity_interval"] is None


def test_report_has_a_picture(oracle: Oracle, capsys: Any) -> None:
    measure(oracle, ScriptedModel(), capsys, "--context-tokens", "9")
    assert main(["report", "results/ppl.oracle.jsonl", "--out", "report"]) == 0
    text = Path("report/report.md").read_text()
    assert "names no corpus" in text and "(ppl-0/position.svg)" in text and "kl.svg" not in text
    assert "<svg" in Path("report/ppl-0/position.svg").read_text()


def test_short_text_is_one_chunk() -> None:
    assert cut_chunks([5, 6, 7], (1,), 100, None) == [[1, 5, 6, 7]]
    assert cut_chunks([5, 6, 7, 8], (), 2, 1) == [[5, 6]]
    with pytest.raises(BadInputError, match="too few"):
        cut_chunks([5], (), 100, None)
    with pytest.raises(BadInputError, match="leaves nothing"):
        cut_chunks([5, 6], (1,), 2, None)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(2, 20))
def test_lm_eval_scores_each_token_once_with_the_most_context(count: int, context: int) -> None:
    tokens = list(range(100, 100 + count))
    windows = lm_eval_windows(tokens, 1, context, 0)
    assert [token for window in windows for token in window.prompt[window.first_scored :]] == tokens
    stream = [1, *tokens]
    for window in windows:
        at = stream.index(window.prompt[0])
        assert list(window.prompt) == stream[at : at + len(window.prompt)] and window.first_scored >= 1
    assert all(len(window.prompt) == min(context, count + 1) for window in windows)


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(3, 12), st.integers(1, 12), st.booleans())
def test_step128_scores_no_token_twice(count: int, context: int, stride: int, bos: bool) -> None:
    tokens, start = list(range(100, 100 + count)), [1] if bos else []
    stride = min(stride, context - len(start))
    windows = step128_windows(tokens, start, context, None, stride)
    scored = [token for window in windows for token in window.prompt[window.first_scored :]]
    assert max(Counter(scored).values()) == 1
    if bos or stride < context:  # else each chunk's first token has nothing before it
        assert scored == tokens[0 if bos else 1 :][: len(scored)]
    dropped = count - 1 - tokens.index(scored[-1])
    assert dropped < stride or len(windows) == 1


@settings(deadline=None)
@given(st.text("ab \n", min_size=1, max_size=40), st.integers(2, 9))
def test_pieces_lose_nothing(text: str, characters: int) -> None:
    pieces = [str(window.prompt) for window in text_pieces(text, characters, None)]
    assert "".join(pieces) == text and max(map(len, pieces)) <= characters
