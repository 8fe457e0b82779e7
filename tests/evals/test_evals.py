from __future__ import annotations

import base64
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from step128_evals.cli import main
from step128_evals.errors import BadInputError
from step128_evals.metrics import DraftCounters, acceptance_between, parse_counters
from step128_evals.perplexity import cut_chunks

GOOD = [["Par", "is."], ["<think>Hm. ", "A disc."], ("get_weather", ['{"city": ', '"Paris"}']), ["Sunny, ", "21."]]
WEATHER_CALL = 2


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setattr("step128_evals.metrics._SETTLE_SECONDS", 0.01)


def run(server: Any, command: str, *options: str) -> int:
    return main([command, "--base-url", server.url, *options])


def test_smoke_passes_and_prints(fake_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_server.answers = list(GOOD)
    assert run(fake_server, "smoke", "--vision-plumbing-only") == 0
    out = capsys.readouterr().out
    for text in (
        "Paris.",
        "A disc.",
        "not trained",
        'get_weather({"city": "Paris"})',
        "Sunny, 21.",
        "12 tokens",
        "(thinking) Hm. \n(answer) A disc.",
    ):
        assert text in out
    assert "32 drafts: position 1: 0.750, position 2: 0.500, position 3: 0.250; 2.50 tokens a step" in out
    assert "all parts passed" in out


@pytest.mark.parametrize(("options", "code"), [(["--vision-plumbing-only"], 0), ([], 70)])
def test_untrained_vision_may_say_nothing(fake_server: Any, options: list[str], code: int) -> None:
    fake_server.answers = [["  "] if number == 1 else good for number, good in enumerate(GOOD)]
    assert run(fake_server, "smoke", *options) == code


def test_smoke_sends_what_it_should(fake_server: Any) -> None:
    fake_server.answers = list(GOOD)
    assert run(fake_server, "smoke", "--reasoning-effort", "low") == 0
    question, image, tool, result = (body for path, body in fake_server.requests if path == "/v1/chat/completions")
    assert question["stream"] and question["temperature"] == 0 and question["reasoning_effort"] == "low"
    url = image["messages"][0]["content"][0]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert picture.size == (224, 224) and picture.getpixel((65, 65)) == (255, 0, 0)
    assert tool["tool_choice"] == "auto"
    assert [entry["role"] for entry in result["messages"]] == ["user", "assistant", "tool"]
    assert result["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Paris"}'
    assert result["messages"][2]["tool_call_id"] == "call-1"


def test_smoke_json(fake_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_server.answers = [answer for number, answer in enumerate(GOOD) if number != 1]
    assert run(fake_server, "smoke", "--json", "--no-image") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and report["exit_code"] == 0 and report["model"] == "tiny"
    assert [part["name"] for part in report["parts"]] == ["question", "tool call"]
    assert report["parts"][0]["answers"][0]["tokens"] == 12
    assert report["acceptance"]["rates"] == [0.75, 0.5, 0.25]


def test_server_without_metrics_can_pass(fake_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_server.answers = list(GOOD)
    fake_server.has_metrics = False
    assert run(fake_server, "smoke") == 0
    assert "nothing was drafted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("position", "answer", "message"),
    [
        (0, ["", " "], "no answer in 12 tokens, finished by 'stop'"),
        (0, ["<think>so long"], "7 characters of reasoning, but no answer"),
        (WEATHER_CALL, ["It is sunny."], "no tool call; the answer was 'It is sunny.'"),
        (WEATHER_CALL, ("get_wether", ["{}"]), "called 'get_wether'"),
        (WEATHER_CALL, ("get_weather", ['{"city": ']), "the arguments are not JSON"),
        (WEATHER_CALL, ("get_weather", ["{}"]), "the arguments have no city"),
        (WEATHER_CALL, ("get_weather", ['["Paris"]']), "the arguments have no city"),
        (
            WEATHER_CALL,
            ("get_weather", ['{"city": "Oslo"}']),
            "asked for the weather in 'Oslo', which the question does not name",
        ),
        (WEATHER_CALL, ("get_weather", ['{"city": "is"}']), "asked for the weather in 'is'"),
        (WEATHER_CALL, ("get_weather", ['{"city": "Pari"}']), "asked for the weather in 'Pari'"),
        (WEATHER_CALL, ("get_weather", ['{"city": "?!"}']), "asked for the weather in '?!'"),
        (3, ("get_weather", ['{"city": "Paris"}']), "no answer, but a call of 'get_weather'"),
    ],
)
def test_smoke_fails(
    fake_server: Any, capsys: pytest.CaptureFixture[str], position: int, answer: Any, message: str
) -> None:
    fake_server.answers = [answer if number == position else good for number, good in enumerate(GOOD)]
    assert run(fake_server, "smoke") == 70
    out = capsys.readouterr().out
    assert f"FAILED: {message}" in out
    assert f"failed: {'question' if position == 0 else 'tool call'}" in out


def test_server_that_refuses_each_request(fake_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_server.chat_status = 500
    assert run(fake_server, "smoke") == 70
    out = capsys.readouterr().out
    assert out.count("answered with status 500") == 3
    assert "scripted failure" in out


def test_stream_that_breaks_off(fake_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_server.answers = list(GOOD)
    fake_server.cut_stream = True
    assert run(fake_server, "smoke", "--json") == 69
    assert "no answer from" in json.loads(capsys.readouterr().out)["error"]


def test_unexpected_group_of_errors_is_reported(
    fake_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fail(*_: object) -> float:
        raise OverflowError("odd")

    (tmp_path / "text").write_text("a" * 30)
    monkeypatch.setattr("step128_evals.perplexity.chunk_nll", fail)
    options = ["--text", str(tmp_path / "text"), "--context-tokens", "9", "--json"]
    assert run(fake_server, "ppl", *options) == 1
    assert "internal error" in json.loads(capsys.readouterr().out)["error"]


def test_model_that_is_not_served(fake_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(fake_server, "smoke", "--model", "huge") == 70
    assert "does not serve huge; it serves tiny" in capsys.readouterr().err


def nll(positions: int) -> float:
    return math.fsum(0.5 * i for i in range(1, positions + 1))


@pytest.mark.parametrize("concurrency", ["1", "3"])
def test_perplexity_with_bos(
    fake_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], concurrency: str
) -> None:
    text = tmp_path / "text"
    text.write_text("a" * 25)
    options = ["--text", str(text), "--context-tokens", "9", "--json", "--concurrency", concurrency]
    assert run(fake_server, "ppl", *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bos_token_ids"] == [1]
    assert report["chunk_positions"] == [8, 8, 8]  # 25 tokens, 8 a chunk beside BOS, one token dropped
    assert report["nll_per_token"] == pytest.approx(nll(8) / 8)
    assert report["perplexity"] == pytest.approx(math.exp(nll(8) / 8))
    assert "BOS [1]" in report["definition"]
    assert all(body["prompt"][0] == 1 for path, body in fake_server.requests if path == "/v1/completions")


def test_perplexity_without_bos_from_standard_input(
    fake_server: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_server.bos = False
    monkeypatch.setattr("sys.stdin", io.StringIO("a" * 40))
    assert run(fake_server, "ppl", "--text", "-", "--context-tokens", "10", "--max-chunks", "2") == 0
    out = capsys.readouterr().out
    assert f"perplexity {math.exp(nll(9) / 9):.4f}" in out
    assert "18 scored tokens in 2 chunks" in out
    assert "first token of each chunk is not scored" in out


def test_short_text_is_one_chunk() -> None:
    assert cut_chunks([5, 6, 7], (1,), 100, None) == [[1, 5, 6, 7]]
    assert cut_chunks([5, 6, 7, 8], (), 2, 1) == [[5, 6]]
    with pytest.raises(BadInputError, match="too few"):
        cut_chunks([5], (), 100, None)
    with pytest.raises(BadInputError, match="leaves nothing"):
        cut_chunks([5, 6], (1,), 2, None)


def test_perplexity_refusals(fake_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    assert run(fake_server, "ppl", "--text", str(text)) == 66
    assert "No such file" in capsys.readouterr().err
    text.write_bytes(b"\xff\xfe\xff")
    assert run(fake_server, "ppl", "--text", str(text)) == 65
    text.write_text("a" * 100)
    assert run(fake_server, "ppl", "--text", str(text), "--context-tokens", "64") == 65
    assert "--context-tokens 63 or less" in capsys.readouterr().err
    fake_server.prompt_logprobs = False
    assert run(fake_server, "ppl", "--text", str(text), "--context-tokens", "10") == 70
    assert "0 prompt log-probabilities for 10 tokens" in capsys.readouterr().err


def test_acceptance(fake_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("".join(chr(97 + i % 26) for i in range(100)))
    options = ["--text", str(text), "--prompts", "4", "--prompt-tokens", "20", "--max-tokens", "16"]
    assert run(fake_server, "acceptance", *options, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["acceptance"] == {"drafts": 16, "rates": [0.75, 0.5, 0.25]}
    assert report["generated_tokens"] == 64 and report["mean_accepted_length"] == 2.5
    prompts = [body["prompt"] for path, body in fake_server.requests if path == "/v1/completions"]
    assert [len(prompt) for prompt in prompts] == [20] * 4
    assert prompts[1][0] == 10 + 97 + 25
    assert run(fake_server, "acceptance", "--text", str(text), "--prompts", "6", "--prompt-tokens", "20") == 65
    fake_server.speculative = False
    assert run(fake_server, "acceptance", *options) == 70
    assert "drafted no tokens" in capsys.readouterr().err


def test_counters_are_summed_over_engines() -> None:
    name = "vllm:spec_decode_num_accepted_tokens_per_pos"
    lines = ["# TYPE vllm:spec_decode_num_drafts counter"]
    lines += [f'vllm:spec_decode_num_drafts_total{{engine="{engine}"}} 10' for engine in (0, 1)]
    lines += [f"# TYPE {name} counter"]
    lines += [f'{name}_total{{engine="{e}",position="{p}"}} {5 - p}' for e in (0, 1) for p in (1, 0)]
    assert parse_counters("\n".join(lines) + "\n") == DraftCounters(20, (10, 8))


def test_no_drafts_is_no_acceptance() -> None:
    counters = DraftCounters(5, (3, 2))
    assert acceptance_between(counters, counters) is None
    assert acceptance_between(None, None) is None
    first = acceptance_between(None, counters)
    assert first is not None and first.rates == (0.6, 0.4)


def test_help_documents_exit_codes() -> None:
    code = "import sys; from step128_evals.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "69 no server answers" in done.stdout
