from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from counting import Counting
from oracle import Oracle, Reply

from step128_evals.cli import main
from step128_evals.evaluation import summary_of
from step128_evals.runs import read_run

SMALL = ["--prompts", "3", "--prompt-tokens", "20", "--long-prompts", "2", "--long-tokens", "200", "--max-tokens", "8"]
DRAFTS = {
    "code": (10, (9, 6, 3)),
    "chat": (8, (4, 2, 1)),
    "prose": (20, (5, 4, 0)),
    "maths": (5, (5, 5, 5)),
    "long": (4, (3, 3, 0)),
}


def run(oracle: Oracle, *options: str) -> int:
    return main(["acceptance", "--base-url", oracle.url, *options])


def domain_of(path: str, body: dict[str, Any], seen: list[str]) -> str | None:
    """By what is asked; pieces of code come before those of prose. None for the probe's requests."""
    if path == "/v1/chat/completions":
        question = body["messages"][0]["content"]
        return None if question == "Hello" else "maths" if "step by step" in question else "chat"
    if isinstance(body["prompt"], str):
        return None
    return "long" if len(body["prompt"]) == 200 else "code" if seen.count("code") < 3 else "prose"


@pytest.fixture
def server(oracle: Oracle) -> Counting:
    return Counting(oracle)


def prompt_number(server: Counting) -> int:
    return sum(isinstance(body.get("prompt"), list) for _, body in server.oracle.requests)


def by_domain(server: Counting) -> list[str]:
    seen: list[str] = []

    def drafts(path: str, body: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
        domain = domain_of(path, body, seen)
        if domain is None:
            return 50, (1, 1, 1)  # what the probe drafts must not be in any figure
        seen.append(domain)
        return DRAFTS[domain]

    server.drafts = drafts
    return seen


def test_exact_rates_of_each_domain(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    seen = by_domain(server)
    assert run(server.oracle, *SMALL, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert seen == ["code"] * 3 + ["chat"] * 3 + ["prose"] * 3 + ["maths"] * 3 + ["long"] * 2
    assert report["num_speculative_tokens"] == 3
    for domain, (drafts, accepted) in DRAFTS.items():
        figures = report["domains"][domain]
        assert figures["drafts"] == drafts * seen.count(domain)
        rates = [row["rate"] for row in figures["positions"].values()]
        assert rates == pytest.approx([count / drafts for count in accepted])
        conditional = [row["conditional"] for row in figures["positions"].values()]
        assert conditional == pytest.approx([accepted[0] / drafts, *(b / a for a, b in itertools.pairwise(accepted))])
        assert figures["mean_accepted_length"] == pytest.approx(1 + sum(accepted) / drafts)
        assert figures["generated_tokens"] == 8 * seen.count(domain)
    totals = [sum(DRAFTS[domain][0] for domain in seen), *(sum(DRAFTS[d][1][i] for d in seen) for i in range(3))]
    assert report["acceptance"] == {"drafts": totals[0], "rates": [count / totals[0] for count in totals[1:]]}
    assert report["mean_accepted_length"] == pytest.approx(1 + sum(totals[1:]) / totals[0])
    # Equal prompts leave bootstrap no spread; 15 of 15 drafts may still be luck.
    always = report["domains"]["maths"]["positions"]["3"]["rate_interval"]
    assert always["low"] == pytest.approx(0.7961, abs=1e-4) and always["high"] == 1


def test_what_is_sent(server: Counting) -> None:
    assert run(server.oracle, *SMALL) == 0
    ours = [
        body for path, body in server.oracle.requests if path == "/v1/completions" and isinstance(body["prompt"], list)
    ]
    assert [len(body["prompt"]) for body in ours] == [20] * 6 + [200] * 2
    assert all(body["prompt"][0] == 1 and 1 not in body["prompt"][1:] for body in ours)  # the oracle's BOS
    assert all(
        body["seed"] == 42 and body["ignore_eos"] and body["temperature"] == 0 and body["max_tokens"] == 8
        for body in ours
    )
    assert len({json.dumps(body["prompt"]) for body in ours}) == 8
    chats = [body["messages"][0]["content"] for body in server.oracle.chats()]
    assert len(set(chats)) == len(chats) - 1  # the probe says hello twice
    assert all("ignore_eos" not in body for body in server.oracle.chats())


def test_text_is_one_domain_with_the_keys_that_others_read(
    server: Counting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(" ".join(f"w{i}" for i in range(100)))
    options = ["--text", str(tmp_path / "text"), "--prompts", "4", "--prompt-tokens", "20", "--max-tokens", "8"]
    assert run(server.oracle, *options, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["acceptance"] == {"drafts": 16, "rates": [0.75, 0.5, 0.25]}
    assert report["mean_accepted_length"] == 2.5 and report["generated_tokens"] == 32
    assert report["seconds"] > 0 and report["tokens_per_second"] > 0  # exact ones: test_timing.py
    assert list(report["domains"]) == ["text"] and report["prompts"] == 4
    assert read_run(Path(report["results"])).manifest.settings["bos_token_ids"] == [1]
    assert run(server.oracle, *options[:3], "11", "--prompt-tokens", "20", "--fresh") == 65
    assert "the text has 199 tokens; 11 prompts of 20 need 220" in capsys.readouterr().err


def test_text_for_people(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server.oracle, *SMALL, "--domains", "chat,code") == 0
    out = capsys.readouterr().out
    assert "6 prompts, greedy, one at a time; MTP 3, that is up to 3 drafted a step." in out
    assert "The model card gives 0.92, 0.75, 0.55, for a text and a convention that it does not name." in out
    assert "Read as cumulative: conditional 0.92 / 0.82 / 0.73, 3.22 tokens a step." in out
    assert "Read as conditional: cumulative 0.92 / 0.69 / 0.38, 2.99 tokens a step." in out
    assert "what follows a natural end counts too" in out and "the first 8 tokens of an answer or less" in out
    assert "step128 plan MODEL --acceptance 0.750,0.500,0.250 --acceptance-unconditional" in out


def test_others_on_the_server_are_noticed_and_asked_again(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    def drafts(path: str, body: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
        if path == "/v1/completions" and prompt_number(server) == 3 and isinstance(body["prompt"], list):
            server.finished += 2
        return 4, (3, 2, 1)

    server.drafts = drafts
    assert run(server.oracle, *SMALL, "--domains", "code", "--json") == 70
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["errors"] == 1 and report["prompts"] == 2
    assert "not alone on the server: the server finished 3 requests, ours were 1" in captured.err
    server.drafts, asked = None, len(server.oracle.requests)
    assert run(server.oracle, *SMALL, "--domains", "code", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 3
    again = [body for path, body in server.oracle.requests[asked:] if isinstance(body.get("prompt"), list)]
    assert len(again) == 1


def test_a_busy_server_is_not_measured(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    server.running = 2
    assert run(server.oracle, *SMALL, "--domains", "code") == 70
    assert "2 requests of others were in the server before ours" in capsys.readouterr().err


def test_without_mtp_the_speed_is_measured(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    server.positions = 0
    assert run(server.oracle, *SMALL, "--domains", "code", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_speculative_tokens"] == 0 and report["acceptance"] is None
    assert report["mean_accepted_length"] is None and report["tokens_per_second"] > 0
    assert Path(report["results"]).name == "acceptance-mtp0.oracle.jsonl"
    assert run(server.oracle, *SMALL, "--domains", "code") == 0
    assert "without MTP (nothing is drafted)" in capsys.readouterr().out


def llama_cpp(server: Counting, drafting: bool) -> None:
    """As llama.cpp: positions show once something was drafted, which the probe's short requests do not do."""
    vllm, begun = server.document, False

    def drafts(path: str, body: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
        nonlocal begun
        begun |= drafting and isinstance(body.get("prompt"), list)
        return (4, (3, 2, 1)) if begun else (0, (0, 0, 0))

    def document(_: int) -> str:
        lines = vllm().replace("vllm:num_requests_running", "llamacpp:requests_processing")
        lines = lines.replace("vllm:spec", "llamacpp:spec").replace("vllm:", "other:")
        return "".join(line for line in lines.splitlines(keepends=True) if begun or "per_pos" not in line)

    server.totals, server.drafts, server.oracle.metrics = [0, 0, 0, 0], drafts, document


def test_llama_cpp_shows_its_depth_after_a_draft(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    llama_cpp(server, drafting=True)
    for _ in range(2):  # the second goes on with the file of the first
        assert run(server.oracle, *SMALL, "--domains", "code", "--json") == 0
        captured = capsys.readouterr()
        report = json.loads(captured.out)
        assert report["num_speculative_tokens"] == 3
        assert report["acceptance"] == {"drafts": 12, "rates": [0.75, 0.5, 0.25]}  # the warm-up is in no figure
        assert Path(report["results"]).name == "acceptance-mtp3.oracle.jsonl"
    assert "nothing is asked now" in captured.err


def test_llama_cpp_that_drafts_nothing(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    llama_cpp(server, drafting=False)
    assert run(server.oracle, *SMALL, "--domains", "code", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert Path(report["results"]).name == "acceptance-mtp-unknown.oracle.jsonl"
    assert read_run(Path(report["results"])).manifest.settings["num_speculative_tokens"] is None
    assert report["num_speculative_tokens"] == 0 and report["acceptance"] is None  # its total of drafts stayed 0


def test_server_without_ignore_eos(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer = lambda path, body: Reply("unknown field", status=422) if "ignore_eos" in body else None
    assert run(server.oracle, *SMALL, "--domains", "code", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 3


@pytest.mark.parametrize("lacking", ["/metrics", "/tokenize", "/v1/completions"])
def test_unsupported(server: Counting, capsys: pytest.CaptureFixture[str], lacking: str) -> None:
    server.oracle.lacking = frozenset({lacking})
    assert run(server.oracle, *SMALL) == 4
    assert "unsupported:" in capsys.readouterr().err


def test_questions_without_a_chat_are_unsupported(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    server.oracle.lacking = frozenset({"/v1/chat/completions"})
    assert run(server.oracle, *SMALL, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["unsupported"] == 6 and report["prompts"] == 8
    assert report["domains"]["chat"]["prompts"] == 0 and report["domains"]["code"]["prompts"] == 3


@pytest.mark.parametrize(
    "bad", [Reply("broken", status=500), Reply("x" * 70, cut_after=2), Reply("", raw="not an event stream")]
)
def test_failures_are_errors_and_the_run_goes_on(
    server: Counting, bad: Reply, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = [True]

    def answer(path: str, body: dict[str, Any]) -> Reply | None:
        return bad if isinstance(body.get("prompt"), list) and failing and failing.pop() else None

    server.answer = answer
    options = [*SMALL, "--domains", "code,prose", "--json"]
    assert run(server.oracle, *options) == 70
    report = json.loads(capsys.readouterr().out)
    assert report["errors"] == 1 and report["prompts"] == 5 and report["acceptance"]["drafts"] == 20
    assert run(server.oracle, *options) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 6


def test_what_does_not_fit_is_refused(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    server.oracle.context_tokens = 100
    assert run(server.oracle, "--domains", "prose", "--prompt-tokens", "95", "--max-tokens", "8") == 65
    assert "do not fit into the server's context of 100" in capsys.readouterr().err
    server.oracle.context_tokens = 1000
    assert run(server.oracle, "--domains", "long", "--long-prompts", "1") == 0
    assert len(server.oracle.requests[-1][1]["prompt"]) == 750


def test_another_depth_is_another_run(server: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*SMALL, "--domains", "code", "--out", "one.jsonl"]
    assert run(server.oracle, *options) == 0
    server.positions = 2
    assert run(server.oracle, *options) == 65
    assert "num_speculative_tokens was 3 and is now 2" in capsys.readouterr().err


def test_report_and_score(server: Counting, tmp_path: Path) -> None:
    by_domain(server)
    assert run(server.oracle, *SMALL, "--out", "run.jsonl") == 0
    result = read_run(tmp_path / "run.jsonl")
    module = summary_of("acceptance")
    summary = module.summarize(result)
    document = module.markdown(result, summary, tmp_path)
    assert "![acceptance and speed by domain](acceptance.svg)" in document
    assert "| maths | 3 | 15 | 1.00 [0.80, 1.00]" in document
    assert (tmp_path / "acceptance.svg").stat().st_size > 5000
    assert "drafts accepted, cumulative share" in (tmp_path / "acceptance.svg").read_text()
    assert module.score(result)["code-01"] == pytest.approx(2.8)
    assert module.headline(summary).endswith("14 prompts")


def test_unknown_domain(oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(oracle, "--domains", "code,music")
    assert "no domain is called music" in capsys.readouterr().err
