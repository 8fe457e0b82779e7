from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from counting import Counting
from oracle import Oracle, Reply

from step128_evals.cli import main
from step128_evals.depth.summary import cell_figures
from step128_evals.evaluation import summary_of
from step128_evals.runs import Item, read_run

SMALL = ["--depths", "0,300,1000", "--concurrencies", "1,3", "--repeats", "2", "--output-tokens", "8", "--json"]


def run(oracle: Oracle, *options: str) -> int:
    return main(["depth", "--base-url", oracle.url, *options])


@pytest.fixture
def server(oracle: Oracle) -> Counting:
    oracle.context_tokens = 1000
    return Counting(oracle)


def prompts(server: Counting) -> list[list[int]]:
    """Prompts in token ids, warm-up included."""
    return [body["prompt"] for _, body in server.oracle.requests if isinstance(body.get("prompt"), list)]


def request(first: float, end: float, tokens: int = 11, prompt_tokens: int | None = 100) -> dict[str, Any]:
    return {"prompt_tokens": prompt_tokens, "tokens": tokens, "first_token_seconds": first, "seconds": end}


def test_figures_from_recorded_times() -> None:
    data = {"kind": "cold", "depth_tokens": 108, "concurrency": 2, "cached_prompt_tokens": 50}
    slow = Item("a", "measured", data=data | {"seconds": 5.0, "requests": [request(1.0, 3.0), request(2.0, 4.0)]})
    fast = Item("b", "measured", data=data | {"seconds": 2.0, "requests": [request(0.5, 1.0), request(0.5, 1.5)]})
    figures = cell_figures([slow, fast])
    assert figures["first_token_seconds"] == {"min": 0.5, "median": 0.75, "max": 2.0}
    # 200 prompt tokens until the last first token: after 2 s, and after half a second.
    assert figures["prefill_tokens_per_second"] == {"min": 100, "median": 250, "max": 400}
    assert figures["decode_tokens_per_second"] == {"min": 5, "median": 7.5, "max": 20}
    assert figures["total_tokens_per_second"] == {"min": 4.4, "median": 7.7, "max": 11}
    assert figures["cached_share"] == 0.25


def test_what_cannot_be_said_is_none() -> None:
    data = {"kind": "cold", "depth_tokens": 9, "concurrency": 1, "cached_prompt_tokens": None, "seconds": 1.0}
    one = Item("a", "measured", data=data | {"requests": [request(1.0, 1.0, tokens=1, prompt_tokens=None)]})
    figures = cell_figures([one])
    assert figures["first_token_seconds"]["median"] == 1
    assert figures["decode_tokens_per_second"] is None and figures["prefill_tokens_per_second"] is None
    assert figures["cached_share"] is None and figures["prompt_tokens"] is None


def test_answers_that_show_nothing_are_in_no_figure() -> None:
    data = {"kind": "cold", "depth_tokens": 9, "concurrency": 2, "cached_prompt_tokens": None, "seconds": 3.0}
    hidden = request(3.0, 3.0)
    figures = cell_figures([Item("a", "measured", data=data | {"requests": [request(1.0, 3.0), hidden]})])
    assert figures["first_token_seconds"] == {"min": 1, "median": 1, "max": 1} and figures["unseen_answers"] == 1
    assert figures["decode_tokens_per_second"]["max"] == 5 and figures["prefill_tokens_per_second"] is None
    figures = cell_figures([Item("a", "measured", data=data | {"requests": [hidden]})])
    assert figures["first_token_seconds"] is None and figures["decode_tokens_per_second"] is None


def test_hidden_answers_end_to_end(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(path: str, body: dict[str, Any]) -> Reply | None:
        return Reply("", tokens=128, delay_seconds=0.05) if body.get("stream") and body["max_tokens"] > 4 else None

    server.oracle.lacking, server.answer = frozenset({"/tokenize", "/metrics"}), answer
    assert run(server.oracle, "--depths", "300", "--concurrencies", "1", "--repeats", "1") == 0
    out = capsys.readouterr().out
    assert "0.00" not in out and "showed nothing before their end" in out
    assert out.splitlines()[-1].startswith("items:")


def test_depth_zero_has_no_prefill_speed(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server.oracle, *SMALL) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]["cold"]
    assert cells["0"]["1"]["prefill_tokens_per_second"] is None
    assert cells["300"]["1"]["prefill_tokens_per_second"]["median"] > 0
    assert run(server.oracle, *SMALL[:-1]) == 0
    out = capsys.readouterr().out
    assert "first token is latency" in out and "no confidence intervals" in out


def test_depths_without_room_for_a_prompt_are_refused(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server.oracle, "--depths", "0,100,128,300") == 65
    assert "leaves no prompt at depth 100, 128" in capsys.readouterr().err


def test_equal_depths_are_measured_once(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--depths", "300,300", "--concurrencies", "2,2", "--repeats", "1", "--output-tokens", "8", "--json"]
    assert run(server.oracle, *options) == 0
    assert json.loads(capsys.readouterr().out)["items"] == 1
    assert len(prompts(server)) == 2 + 2


def test_metrics_that_vanish_are_an_error(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(path: str, body: dict[str, Any]) -> Reply | None:
        if len(prompts(server)) == 2:
            server.oracle.metrics = None
        return None

    server.answer = answer
    options = ["--depths", "300", "--concurrencies", "1", "--repeats", "1", "--output-tokens", "8"]
    assert run(server.oracle, *options) == 70
    assert "hides its /metrics since the cell began" in capsys.readouterr().err


def test_cells_and_exact_prompts(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server.oracle, *SMALL) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["others_would_show"]
    assert list(report["cells"]) == ["cold"] and list(report["cells"]["cold"]) == ["0", "300", "1000"]
    lengths = [len(prompt) for prompt in prompts(server)]
    assert lengths[:3] == [992] * 3  # the warm-up: as many as there will be at once
    # The header alone (4 tokens), then what leaves 8 tokens for the answer; once alone, once three together.
    assert sorted(lengths[3:]) == sorted([4, 292, 992] * (1 + 3) * 2)
    for depth, cells in report["cells"]["cold"].items():
        assert list(cells) == ["1", "3"]
        for cell in cells.values():
            assert cell["repeats"] == 2 and cell["generated_tokens"]["median"] == 8
            assert cell["prompt_tokens"]["median"] == {"0": 4, "300": 292, "1000": 992}[depth]
    headers = [b["prompt"] for p, b in server.oracle.requests if p == "/tokenize" and b["prompt"].startswith("# ")]
    assert len(set(headers)) == len(headers) == 3 + 2 * 3 * 4
    streamed = [body for _, body in server.oracle.requests if isinstance(body.get("prompt"), list)]
    assert all(
        body["seed"] == 42 and body["stream"] and body["ignore_eos"] and body["temperature"] == 0 for body in streamed
    )


def test_beyond_the_context_is_unsupported(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--concurrencies", "1", "--repeats", "1", "--output-tokens", "8"]
    assert run(server.oracle, *options) == 0
    out = capsys.readouterr().out
    assert "Unsupported: depth 8192 is beyond the server's context of 1000 tokens." in out
    assert out.count("Unsupported:") == 5
    assert run(server.oracle, "--depths", "2k,4k", "--out", "deep.jsonl") == 4


def test_cached_prompts_differ_only_in_their_end(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(path: str, body: dict[str, Any]) -> Reply | None:
        if isinstance(body.get("prompt"), list):
            server.cached += 100
        return None

    server.answer = answer
    options = ["--depths", "300", "--concurrencies", "2", "--repeats", "1", "--output-tokens", "8", "--cached"]
    assert run(server.oracle, *options, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cells"]["cached"]["300"]["2"]["cached_share"] == pytest.approx(200 / 584)
    prime, *pair = prompts(server)[-3:]
    assert len(prime) == 292 and all(prompt[:288] == prime[:288] for prompt in pair)
    asked = [body["max_tokens"] for _, body in server.oracle.requests if isinstance(body.get("prompt"), list)]
    assert asked[-3:] == [1, 8, 8]
    assert run(server.oracle, *options) == 0
    out = capsys.readouterr().out
    assert "cached" in out and "should be new came from the prefix cache" in out


def test_second_run_has_new_headers(server: Counting) -> None:
    assert run(server.oracle, *SMALL) == 0
    first = {b["prompt"] for p, b in server.oracle.requests if p == "/tokenize"}
    server.oracle.requests.clear()
    assert run(server.oracle, *SMALL, "--fresh") == 0
    again = {b["prompt"] for p, b in server.oracle.requests if p == "/tokenize" and b["prompt"].startswith("# ")}
    assert again and not again & first


def test_others_on_the_server_are_an_error(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    server.others = 1
    assert run(server.oracle, *SMALL) == 70
    assert "the server finished 2 requests, ours were 1" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [Reply("broken", status=500), Reply("x" * 70, cut_after=2)])
def test_failed_cells_are_asked_again(server: Counting, bad: Reply, capsys: pytest.CaptureFixture[str]) -> None:
    failing = [True]

    def answer(path: str, body: dict[str, Any]) -> Reply | None:
        return bad if len(body.get("prompt", "")) == 292 and failing and failing.pop() else None

    server.answer = answer
    assert run(server.oracle, *SMALL) == 70
    report = json.loads(capsys.readouterr().out)
    assert report["errors"] == 1 and report["items"] == 12
    assert report["cells"]["cold"]["300"]["1"]["repeats"] == 1
    asked = len(server.oracle.requests)
    assert run(server.oracle, *SMALL) == 0
    assert json.loads(capsys.readouterr().out)["cells"]["cold"]["300"]["1"]["repeats"] == 2
    again = [b for _, b in server.oracle.requests[asked:] if isinstance(b.get("prompt"), list)]
    assert len(again) == 3 + 1  # warm-up, and the one that failed


def test_server_without_ignore_eos(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(path: str, body: dict[str, Any]) -> Reply | None:
        return Reply("unknown field", status=400) if "ignore_eos" in body else Reply("short", tokens=5)

    server.answer = answer
    assert run(server.oracle, *SMALL[:-1]) == 0
    assert "In 6 cells an answer ended before 8 tokens." in capsys.readouterr().out


def test_server_that_only_chats(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    server.oracle.lacking = frozenset({"/tokenize", "/metrics"})
    assert run(server.oracle, *SMALL[:-1]) == 0
    assert "Whether others used the server meanwhile cannot be told" in capsys.readouterr().out
    assert run(server.oracle, *SMALL) == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["exact"] and not report["others_would_show"]
    # By text, after one calibration: within a fifth of what was wanted.
    assert report["cells"]["cold"]["1000"]["1"]["prompt_tokens"]["median"] == pytest.approx(992, rel=0.2)
    assert report["cells"]["cold"]["300"]["3"]["cached_share"] is None
    server.oracle.lacking = frozenset({"/tokenize", "/v1/chat/completions"})
    assert run(server.oracle, *SMALL) == 4


def test_report_and_score(server: Counting, tmp_path: Path) -> None:
    assert run(server.oracle, *SMALL, "--cached", "--out", "run.jsonl") == 0
    result = read_run(tmp_path / "run.jsonl")
    module = summary_of("depth")
    summary = module.summarize(result)
    assert "![speed by depth](depth.svg)" in module.markdown(result, summary, tmp_path)
    assert (tmp_path / "depth.svg").stat().st_size > 5000
    assert "1 at once, cached" in (tmp_path / "depth.svg").read_text()  # matplotlib notes each text as a comment
    assert len(module.score(result)) == len(result.items) == 20
    assert module.headline(summary).startswith("1000 tokens deep, 1 at once: first token after")
