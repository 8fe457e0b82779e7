"""Times through HTTP. A server that waits makes lower bounds of durations certain; the upper ones are wide."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from counting import Counting
from oracle import PIECE_CHARACTERS, Oracle, Reply

from step128_evals.chat import Answer, ChatRequest, ask_chat
from step128_evals.cli import main
from step128_evals.client import Client
from step128_evals.completion import complete

FIRST_SECONDS, PIECE_SECONDS, PIECES, TOKENS = 0.3, 0.05, 10, 21
SLACK_SECONDS = 3.0  # a loaded machine is slow, and says nothing about the code
EMPTY_PIECES = 10
DECODING_SECONDS = (PIECES + EMPTY_PIECES) * PIECE_SECONDS
TEXT = "x" * PIECE_CHARACTERS * PIECES


def slow(empty_pieces: int = 0) -> Reply:
    """The chunk with the finish reason waits too: ten pieces are ten waits after the first."""
    return Reply(
        TEXT,
        tokens=TOKENS,
        first_delay_seconds=FIRST_SECONDS,
        piece_delay_seconds=PIECE_SECONDS,
        empty_pieces=empty_pieces,
    )


def ask(oracle: Oracle, path: str, reply: Reply) -> Answer:
    oracle.respond = lambda *_: reply

    async def asked() -> Answer:
        async with Client(oracle.url, "secret") as client:
            if path == "chat":
                return await ask_chat(client, "oracle", ChatRequest([{"role": "user", "content": "x"}]))
            return await complete(client, "oracle", [1, 2], TOKENS)

    return asyncio.run(asked())


@pytest.mark.parametrize("path", ["chat", "completions"])
@pytest.mark.parametrize("empty_pieces", [0, EMPTY_PIECES])
def test_first_token_and_decoding(oracle: Oracle, path: str, empty_pieces: int) -> None:
    answer = ask(oracle, path, slow(empty_pieces))
    assert answer.tokens == TOKENS
    assert FIRST_SECONDS <= answer.first_token_seconds < FIRST_SECONDS + SLACK_SECONDS
    decoding = answer.total_seconds - answer.first_token_seconds
    waited = (PIECES + empty_pieces) * PIECE_SECONDS
    # The first chunk may be read late, and the time after it is shorter then.
    late = answer.first_token_seconds - FIRST_SECONDS
    assert waited - late <= decoding < waited + SLACK_SECONDS
    assert answer.total_seconds >= FIRST_SECONDS + waited


@pytest.mark.parametrize("path", ["chat", "completions"])
def test_an_answer_that_shows_nothing_has_no_decoding(oracle: Oracle, path: str) -> None:
    answer = ask(oracle, path, Reply("", tokens=TOKENS, first_delay_seconds=FIRST_SECONDS))
    assert answer.first_token_seconds == answer.total_seconds >= FIRST_SECONDS
    assert answer.tokens_per_second == 0


def waiting(oracle: Oracle) -> Counting:
    """Waits in measured requests; those of the probe are for fewer tokens."""
    counting = Counting(oracle, tokens=TOKENS)

    def answer(_: str, body: dict[str, Any]) -> Reply | None:
        return slow(EMPTY_PIECES) if body.get("stream") and body["max_tokens"] == TOKENS else None

    counting.answer = answer
    return counting


def bounds(figure: float) -> None:
    """Twenty tokens after the first, in a second or a little less if the first was read late."""
    after = TOKENS - 1
    assert after / (DECODING_SECONDS + SLACK_SECONDS) < figure < after / (DECODING_SECONDS - 0.3)


def test_acceptance_measures_it(oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    waiting(oracle)
    options = ["--domains", "code,chat", "--prompts", "1", "--prompt-tokens", "20", "--max-tokens", str(TOKENS)]
    assert main(["acceptance", "--base-url", oracle.url, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    whole = FIRST_SECONDS + DECODING_SECONDS
    for domain in ("code", "chat"):
        figures = report["domains"][domain]
        bounds(figures["decode_tokens_per_second"])
        assert whole <= figures["seconds"] < whole + SLACK_SECONDS
        assert TOKENS / (whole + SLACK_SECONDS) < figures["tokens_per_second"] <= TOKENS / whole


def test_depth_measures_it(oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    waiting(oracle)
    options = ["--depths", "300", "--concurrencies", "1", "--repeats", "1", "--output-tokens", str(TOKENS)]
    assert main(["depth", "--base-url", oracle.url, *options, "--json"]) == 0
    cell = json.loads(capsys.readouterr().out)["cells"]["cold"]["300"]["1"]
    whole = FIRST_SECONDS + DECODING_SECONDS
    assert FIRST_SECONDS <= cell["first_token_seconds"]["median"] < FIRST_SECONDS + SLACK_SECONDS
    prompt = 300 - TOKENS
    assert prompt / (FIRST_SECONDS + SLACK_SECONDS) < cell["prefill_tokens_per_second"]["median"]
    assert cell["prefill_tokens_per_second"]["median"] <= prompt / FIRST_SECONDS
    bounds(cell["decode_tokens_per_second"]["median"])
    total = cell["total_tokens_per_second"]["median"]
    assert TOKENS / (whole + SLACK_SECONDS) < total <= TOKENS / whole
