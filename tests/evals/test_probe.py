"""The probe says what the endpoint can do, in each dialect, and nothing more."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from oracle import KEY, Oracle, Reply, words

from step128_evals.cli import main
from step128_evals.client import Client
from step128_evals.errors import BusyError, UnsupportedError
from step128_evals.probe import CAPABILITIES, Endpoint, probe_endpoint
from step128_evals.tokens import find_counter


def probed(oracle: Oracle, **options: Any) -> Endpoint:
    async def probe() -> Endpoint:
        async with Client(oracle.url, KEY) as client:
            return await probe_endpoint(client, None, **options)

    return asyncio.run(probe())


DRAFTS = (
    "# TYPE vllm:spec_decode_num_drafts counter\nvllm:spec_decode_num_drafts_total 1\n"
    "# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter\n"
    'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 1\n'
)


def everything(path: str, body: dict[str, Any]) -> Reply | None:
    if "prompt_logprobs" in body:
        return Reply(body={"choices": [{"prompt_logprobs": [None, {"5": {"logprob": -1.0}}]}]})
    return None


def test_an_endpoint_that_can_all(oracle: Oracle) -> None:
    oracle.respond, oracle.metrics = everything, DRAFTS
    endpoint = probed(oracle)
    assert [name for name in CAPABILITIES if not endpoint.can(name)] == []
    assert endpoint.how("prompt_logprobs") == "prompt_logprobs" and endpoint.how("tokenize") == "vllm"
    assert endpoint.max_context_tokens == 100_000 and endpoint.server == "vLLM"
    endpoint.require(*CAPABILITIES)


def foreign(path: str, body: dict[str, Any]) -> Reply | None:
    """As llama.cpp's server with a text model and another's completions: other dialects, refusals."""
    if path == "/tokenize":
        return Reply(body={"tokens": words(body["content"])}) if "content" in body else Reply("content?", status=400)
    if "prompt_logprobs" in body:
        return Reply("unknown field", status=422)
    if body.get("echo"):
        return Reply(body={"choices": [{"logprobs": {"token_logprobs": [None, -1.0, -2.0]}}]})
    if "image_url" in json.dumps(body):
        return Reply("no mmproj", status=500)
    if body.get("tools"):
        return Reply("tools need --jinja", status=500)
    return None


def test_an_endpoint_of_another_kind(oracle: Oracle) -> None:
    oracle.respond, oracle.context_tokens = foreign, None
    endpoint = probed(oracle)
    assert endpoint.how("tokenize") == "llama.cpp" and endpoint.how("prompt_logprobs") == "echo"
    assert not endpoint.can("images") and "no mmproj" in endpoint.how("images")
    assert not endpoint.can("metrics") and endpoint.max_context_tokens is None
    with pytest.raises(UnsupportedError, match=r"has no tools: .*--jinja") as error:
        endpoint.require("chat", "tools")
    assert error.value.exit_code == 4


def test_no_connection_is_used_twice(oracle: Oracle) -> None:
    """llama.cpp's server drops them after a stream without a word; both HTTP clients must ask for a new one."""
    probed(oracle)
    assert oracle.connection_headers == {"close"}


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_not_one_that_cannot(oracle: Oracle, status: int) -> None:
    oracle.respond = lambda path, body: Reply("later", status=status) if body.get("tools") else None
    with pytest.raises(BusyError, match=f"status {status}: later"):
        probed(oracle)


def test_a_servers_words_are_no_markup(oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    oracle.respond = lambda path, body: Reply("no [/INST] here", status=500) if body.get("tools") else None
    assert main(["probe", "--base-url", oracle.url]) == 0
    assert "[/INST]" in capsys.readouterr().out


def test_only_what_is_wanted_is_asked(oracle: Oracle) -> None:
    endpoint = probed(oracle, only=("chat",))
    assert endpoint.can("chat") and not endpoint.can("tools") and endpoint.how("tools") == "not asked"
    assert len(oracle.requests) == 1


def test_refused_key_is_no_missing_capability(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "other")
    assert main(["probe", "--base-url", oracle.url]) == 5


def test_command(oracle: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    oracle.respond = foreign
    assert main(["probe", "--base-url", oracle.url]) == 0
    assert "model oracle, context 100000 tokens" in capsys.readouterr().out
    assert main(["probe", "--base-url", oracle.url, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["capabilities"]["images"]["supported"] is False and report["exit_code"] == 0


@pytest.mark.parametrize("dialect", ["vllm", None])
def test_longest_prefix(oracle: Oracle, dialect: str | None) -> None:
    text = "".join(f"line {number:03}\n" for number in range(500))

    async def cut(limit: int) -> str:
        async with Client(oracle.url, KEY) as client:
            counter = await find_counter(client, "oracle", dialect, text)
            assert counter.exact == (dialect is not None)
            found = await counter.longest_prefix(text, limit)
            assert await counter.count(found) <= limit
            if found != text:
                following = text[: text.index("\n", len(found)) + 1]
                assert await counter.count(following) > limit
            return found

    assert asyncio.run(cut(0)) == ""
    assert asyncio.run(cut(10_000)) == text
    if dialect:
        assert asyncio.run(cut(101)) == "".join(f"line {number:03}\n" for number in range(25))
    else:
        # Estimated from the prompt's tokens, which the template's own words make a little more than they are.
        assert asyncio.run(cut(101)).count("\n") == pytest.approx(25, abs=1)
