"""The limits of one request: its body, its tokens and answers, and the fields nobody may set."""

import asyncio
import json
from typing import Any

import pytest
from asgi_requests import Answer, ask, ask_async, bearer

from step128_launcher.access import ACCESS_VARIABLE, AccessLimits
from step128_launcher.middleware import Guard, body
from step128_launcher.middleware.amounts import MAX_SEQUENCES, REFUSED_FIELDS

LIMITS = AccessLimits(max_body_bytes=1000, max_tokens=100)


class Echo:
    """Answers with the body it got, and knows whether the client's going away reaches it."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert not message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})
        assert (await receive())["type"] == "http.disconnect"


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Guard:
    monkeypatch.setenv("VLLM_API_KEY", "k")
    monkeypatch.setenv(ACCESS_VARIABLE, LIMITS.to_json())
    return Guard(Echo())


def post(guard: Guard, document: Any, path: str = "/v1/chat/completions") -> Answer:
    return ask(
        guard, "POST", path, bearer("k"), document if isinstance(document, bytes) else json.dumps(document).encode()
    )


def test_limits_survive_the_environment() -> None:
    limits = AccessLimits(1, 2, 3, 4, 5, ("a.example", "b.example"))
    assert AccessLimits.from_json(limits.to_json()) == limits and " " not in limits.to_json()


def test_the_default_body_holds_the_largest_image() -> None:
    raw = 3024 * 3024 * 3
    assert AccessLimits().max_image_bytes > raw and AccessLimits().max_body_bytes > raw * 4 / 3 + (1 << 20)


def test_a_body_arrives_as_it_was_sent(guard: Guard) -> None:
    sent = b' {"messages": [ ], "max_tokens":100 }\n'
    assert post(guard, sent).body == sent
    assert ask(guard, "POST", "/tokenize", bearer("k"), [sent[:7], b"", sent[7:20], sent[20:]]).body == sent


@pytest.mark.parametrize("declared", [b"1001", b"9" * 30])
def test_a_declared_length_is_refused_unread(declared: bytes, guard: Guard) -> None:
    async def receive() -> Any:
        raise AssertionError("the body was read")

    answer = asyncio.run(_ask_with(guard, receive, [(b"content-length", declared)]))
    assert answer.status == 413 and "1000 bytes" in answer.message and "--max-body-size" in answer.message


def test_a_streamed_body_is_counted_and_left(guard: Guard) -> None:
    asked = 0

    async def receive() -> Any:
        nonlocal asked
        asked += 1
        return {"type": "http.request", "body": b"x" * 300, "more_body": True}

    for headers in ([], [(b"content-length", b"5")], [(b"content-length", b"-1")]):
        asked = 0
        assert asyncio.run(_ask_with(guard, receive, headers)).status == 413 and asked == 4


def test_the_last_byte_that_fits(guard: Guard) -> None:
    fits = b'{"prompt": "' + b"x" * (1000 - 14) + b'"}'
    assert len(fits) == 1000 and post(guard, fits, "/v1/completions").status == 200
    assert post(guard, fits.replace(b"x", b"xx", 1), "/v1/completions").status == 413


def test_nothing_is_read_without_the_key(guard: Guard) -> None:
    async def receive() -> Any:
        raise AssertionError("the body was read")

    assert asyncio.run(_ask_with(guard, receive, [], key="x")).status == 401


def test_a_slow_body(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_SECONDS", 0.05)

    async def receive() -> Any:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b" ", "more_body": True}

    answer = asyncio.run(_ask_with(guard, receive, []))
    assert answer.status == 408 and answer.headers[b"connection"] == b"close" and answer.reason == "body_slow"


def test_a_client_that_goes_away(guard: Guard) -> None:
    async def receive() -> Any:
        return {"type": "http.disconnect"}

    assert asyncio.run(_ask_with(guard, receive, [])).status == 0


NOT_JSON = [
    b"",
    b"{",
    b"[]",
    b'"text"',
    b"null",
    b'{"a": 1} {}',
    b'{"a": 1, "a": 2}',
    b'{"messages": [{"content": "x", "content": "y"}]}',
    b'{"temperature": NaN}',
    b'{"temperature": -Infinity}',
    '{"a": "ü"}'.encode("latin-1"),
    '{"a": 1}'.encode("utf-16"),
    '{"a": 1}'.encode("utf-8-sig"),
    b'{"a": ' + b"[" * 480 + b"]" * 480 + b"}" * 2,
]


@pytest.mark.parametrize("document", NOT_JSON)
def test_bodies_that_could_be_read_in_two_ways(document: bytes, guard: Guard) -> None:
    answer = post(guard, document)
    assert answer.status == 400 and answer.message.startswith("The body is not one JSON object")


def test_deep_nesting_and_long_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k")
    monkeypatch.setenv(ACCESS_VARIABLE, AccessLimits().to_json())
    guard = Guard(Echo())
    for document in (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", b'{"seed": ' + b"9" * 10_000 + b"}"):
        assert post(guard, document).status == 400


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_tokens_of_an_answer(name: str, guard: Guard) -> None:
    for value, status in ((100, 200), (None, 200), (0, 200), (101, 400), (10**30, 400)):
        assert post(guard, {name: value}).status == status
    assert post(guard, {name: 101}).message == f"{name} is 101; this server generates at most 100 tokens a request."
    # vLLM's own parser would take each of these for a number.
    for spelled in ("101", 101.0, "1_01", True, [101]):
        assert "whole number" in post(guard, {name: spelled}).message


def test_answers_of_a_request(guard: Guard) -> None:
    path = "/v1/completions"
    for document in ({"n": MAX_SEQUENCES}, {"prompt": [1] * 300}, {"prompt": [[1], [2]], "n": 128}, {"prompt": []}):
        assert post(guard, document, path).status == 200
    for document in (
        {"n": MAX_SEQUENCES + 1},
        {"prompt": ["a"] * 129, "n": 2},
        {"prompt": [""] * 240, "n": 100},
    ):
        assert f"at most {MAX_SEQUENCES}" in post(guard, document, path).message
    assert post(guard, {"n": "300"}, path).status == 400


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_fields_that_nobody_may_set(name: str, guard: Guard) -> None:
    assert post(guard, {name: None}).status == 200
    for value in ({}, {"a": 1}, "x", False):
        answer = post(guard, {name: value})
        assert answer.status == 400 and name in answer.message and answer.reason == "request"


def test_tools_are_functions(guard: Guard) -> None:
    function = {"type": "function", "name": "f", "parameters": {}}
    assert post(guard, {"tools": [function, {"function": {}}]}, "/v1/responses").status == 200
    for kind in ("mcp", "web_search", "code_interpreter", None, 3):
        tool = {"type": kind, "server_url": "http://127.0.0.1:1"}
        assert post(guard, {"tools": [function, tool]}, "/v1/responses").status == 400


async def _ask_with(guard: Guard, receive: Any, headers: list[tuple[bytes, bytes]], key: str = "k") -> Answer:
    """Ask with a body that comes from `receive`."""

    async def through(scope: Any, _: Any, send: Any) -> None:
        await guard(scope, receive, send)

    return await ask_async(through, "POST", "/v1/completions", [*bearer(key), *headers])
