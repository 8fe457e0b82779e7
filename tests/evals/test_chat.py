"""Answers, streamed and whole, are the same answer; reasoning left in the text is told from it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import KEY, Oracle, Reply

from step128_evals.chat import Answer, ChatRequest, ask_chat, split_reasoning
from step128_evals.client import Client
from step128_evals.errors import EvalError


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("plain", ("", "plain")),
        ("<think>Hm.</think>\n\n    indented\n", ("Hm.", "    indented\n")),
        ("Hm.</think>answer", ("Hm.", "answer")),
        (" <think>\na\nb\n</think> \n\t\n x", ("a\nb", " x")),
        ("<think>never ended", ("", "<think>never ended")),
        ("<think></think>x </think> y", ("", "x </think> y")),
    ],
)
def test_split_reasoning(text: str, parts: tuple[str, str]) -> None:
    assert split_reasoning(text) == parts


def ask(oracle: Oracle, stream: bool) -> Answer:
    async def question() -> Answer:
        async with Client(oracle.url, KEY) as client:
            return await ask_chat(client, "oracle", ChatRequest([{"role": "user", "content": "x"}], stream=stream))

    return asyncio.run(question())


REPLY = Reply("Two calls.", "Let me think about it.", (("f", '{"a": "ü"}'), ("g", "{}")), tokens=31)


@pytest.mark.parametrize("stream", [True, False])
def test_streamed_and_whole(oracle: Oracle, stream: bool) -> None:
    oracle.respond = lambda path, body: REPLY
    answer = ask(oracle, stream)
    assert (answer.text, answer.reasoning, answer.finish_reason) == (REPLY.text, REPLY.reasoning, "tool_calls")
    assert [call["name"] for call in answer.tool_calls] == ["f", "g"]
    assert answer.tool_calls[0]["arguments"] == '{"a": "ü"}' and answer.tool_calls[1]["id"] == "call-1"
    assert answer.tokens == 31 and answer.tokens_counted and answer.prompt_tokens == 1
    assert 0 < answer.first_token_seconds <= answer.total_seconds
    message = answer.assistant_message
    assert message["content"] == "Two calls." and message["tool_calls"][0]["function"]["name"] == "f"


@pytest.mark.parametrize("stream", [True, False])
def test_no_usage(oracle: Oracle, stream: bool) -> None:
    oracle.respond = lambda path, body: Reply("seven chars a piece", usage=False)
    answer = ask(oracle, stream)
    assert not answer.tokens_counted and answer.tokens == (3 if stream else 0) and answer.prompt_tokens is None


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "reply", [Reply("cut in the middle of it", cut_after=2), Reply(raw="<html>"), Reply(status=500), Reply(raw="{}")]
)
def test_what_is_no_answer(oracle: Oracle, stream: bool, reply: Reply) -> None:
    oracle.respond = lambda path, body: reply
    with pytest.raises(EvalError):
        ask(oracle, stream)


def chunk(delta: object, finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return f"data: {json.dumps({'id': 'x', 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


def call(**fields: object) -> dict[str, object]:
    return {"tool_calls": [{"type": "function", **fields}]}


def test_streamed_calls_without_an_index(oracle: Oracle) -> None:
    stream = chunk(call(id="a", function={"name": "f", "arguments": "{"}))
    stream += chunk(call(function={"arguments": "}"})) + chunk(call(id="b", function={"name": "g", "arguments": "[]"}))
    oracle.respond = lambda path, body: Reply(raw=stream + chunk({}, "tool_calls") + "data: [DONE]\n\n")
    calls = [(call["name"], call["arguments"]) for call in ask(oracle, True).tool_calls]
    assert calls == [("f", "{}"), ("g", "[]")]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("usage", [{}, {"prompt_tokens": None, "completion_tokens": None}, None])
def test_counts_that_are_none(oracle: Oracle, stream: bool, usage: object) -> None:
    whole = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}], "usage": usage}
    last = f"data: {json.dumps({'id': 'x', 'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
    raw = chunk({"content": "yes"}) + chunk({}, "stop") + last if stream else json.dumps(whole)
    oracle.respond = lambda path, body: Reply(raw=raw)
    answer = ask(oracle, stream)
    assert answer.text == "yes" and not answer.tokens_counted and answer.prompt_tokens is None


MALFORMED = [
    (False, json.dumps({"choices": [{"message": None, "finish_reason": "stop"}]})),
    (False, json.dumps({"choices": [{"finish_reason": "stop"}]})),
    (False, json.dumps({"choices": [{"message": {"tool_calls": [{"function": None}]}, "finish_reason": "stop"}]})),
    (True, chunk(None)),
    (True, 'data: {"choices": null}\n\n'),
    (True, 'data: {"choices": [{"index": 0, "finish_reason": "stop"}]}\n\n'),
]


@pytest.mark.parametrize(("stream", "raw"), MALFORMED)
def test_answers_that_do_not_follow_the_api(oracle: Oracle, stream: bool, raw: str) -> None:
    oracle.respond = lambda path, body: Reply(raw=raw)
    with pytest.raises(EvalError, match="does not follow the API"):
        ask(oracle, stream)


def test_what_shows_nothing_has_its_time_at_its_end(oracle: Oracle) -> None:
    oracle.respond = lambda path, body: Reply("", tokens=128, first_delay_seconds=0.2)
    answer = ask(oracle, True)
    assert answer.tokens == 128 and answer.tokens_per_second == 0
    assert answer.first_token_seconds == answer.total_seconds >= 0.2


def test_tokens_that_show_nothing_take_time_too(oracle: Oracle) -> None:
    oracle.respond = lambda path, body: Reply("shown", tokens=11, empty_pieces=4, piece_delay_seconds=0.05)
    answer = ask(oracle, True)
    assert answer.total_seconds - answer.first_token_seconds >= 0.25  # four empty pieces and the end
    assert answer.tokens_per_second <= 10 / 0.25


def test_a_reader_that_has_seen_enough() -> None:
    program = Path(sys.executable).parent / "step128-eval"
    ended = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program} tools --help | true"], capture_output=True, text=True, check=False
    )
    assert "Error" not in ended.stderr
