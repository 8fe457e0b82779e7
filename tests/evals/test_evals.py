from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from typing import Any

import pytest
from PIL import Image

from step128_evals.cli import main

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


def test_model_that_is_not_served(fake_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(fake_server, "smoke", "--model", "huge") == 70
    assert "does not serve huge; it serves tiny" in capsys.readouterr().err


def test_help_documents_exit_codes() -> None:
    code = "import sys; from step128_evals.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "69 no server answers" in done.stdout
