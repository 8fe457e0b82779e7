"""Answers, streamed and whole, are the same answer; reasoning left in the text is told from it."""

from __future__ import annotations

import asyncio
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


def test_a_reader_that_has_seen_enough() -> None:
    program = Path(sys.executable).parent / "step128-eval"
    ended = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program} tools --help | true"], capture_output=True, text=True, check=False
    )
    assert "Error" not in ended.stderr
