"""A small OpenAI-like server whose behaviour each test scripts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from oracle import Oracle, serving
from tool_answers import Spoil, perfect

from step128_evals.cli import main

KEY = "secret"
MODEL = "tiny"
BOS = 1
LOGPROB = -0.5


@dataclass
class FakeServer:
    """``answers`` are streamed in turn: text in pieces, or a tool call (name, pieces of arguments)."""

    url: str
    answers: list[list[str] | tuple[str, list[str]]] = field(default_factory=list)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    bos: bool = True
    prompt_logprobs: bool = True
    speculative: bool = True
    has_metrics: bool = True
    cut_stream: bool = False
    chat_status: int = 200
    drafts: int = 0

    def metrics(self) -> str:
        if not self.speculative:
            return "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0.0\n"
        name = "vllm:spec_decode_num_accepted_tokens_per_pos"
        lines = ["# TYPE vllm:spec_decode_num_drafts counter"]
        lines += [f'vllm:spec_decode_num_drafts_total{{engine="0"}} {100.0 + self.drafts}', f"# TYPE {name} counter"]
        for position, rate in enumerate((0.75, 0.5, 0.25)):
            value = 10.0 + rate * self.drafts
            lines.append(f'{name}_total{{engine="0",position="{position}"}} {value}')
        return "\n".join(lines) + "\n"


def chat_chunks(answer: list[str] | tuple[str, list[str]]) -> Iterator[dict[str, Any]]:
    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {
            "id": "x",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": MODEL,
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        }

    yield chunk({"role": "assistant", "content": ""})
    if isinstance(answer, tuple):
        name, pieces = answer
        call = {"index": 0, "id": "call-1", "type": "function", "function": {"name": name, "arguments": ""}}
        yield chunk({"tool_calls": [call]})
        for piece in pieces:
            yield chunk({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
        yield chunk({}, "tool_calls")
    else:
        for piece in answer:
            thought = piece.startswith("<think>")
            yield chunk({"reasoning": piece.removeprefix("<think>")} if thought else {"content": piece})
        yield chunk({}, "stop")
    usage = {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
    yield {**chunk({}), "choices": [], "usage": usage}


def handler_for(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def send(self, status: int, body: object, content_type: str = "application/json") -> None:
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def authorized(self) -> bool:
            if self.path.startswith("/v1") and self.headers.get("Authorization") != f"Bearer {KEY}":
                self.send(401, {"error": {"message": "Unauthorized"}})
                return False
            return True

        def do_GET(self) -> None:
            if not self.authorized():
                return
            if self.path == "/metrics" and server.has_metrics:
                self.send(200, server.metrics(), "text/plain")
            elif self.path == "/v1/models":
                self.send(200, {"object": "list", "data": [{"id": MODEL, "max_model_len": 64}]})
            else:
                self.send(404, {"error": {"message": "no such path"}})

        def do_POST(self) -> None:
            if not self.authorized():
                return
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, body))
            if self.path == "/tokenize":
                ids = [10 + ord(character) for character in body["prompt"]]
                self.send(200, {"tokens": [BOS, *ids] if body["add_special_tokens"] and server.bos else ids})
            elif self.path == "/v1/completions":
                server.drafts += 4
                choice: dict[str, Any] = {"index": 0, "text": "x", "finish_reason": "length"}
                if server.prompt_logprobs and "prompt_logprobs" in body:
                    # The n-th token is -0.5 * n, and a more probable token stands beside it.
                    entries = [
                        {str(t): {"logprob": LOGPROB * i}, "7": {"logprob": 0.0}} for i, t in enumerate(body["prompt"])
                    ]
                    choice["prompt_logprobs"] = [None, *entries[1:]]
                self.send(200, {"choices": [choice], "usage": {"completion_tokens": body["max_tokens"]}})
            elif self.path == "/v1/chat/completions":
                self.chat()
            else:
                self.send(404, {"error": {"message": "no such path"}})

        def chat(self) -> None:
            if server.chat_status != 200:
                self.send(server.chat_status, {"error": {"message": "scripted failure"}})
                return
            server.drafts += 8
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.send_header("Content-Length", "1000000") if server.cut_stream else None
            self.end_headers()
            for number, chunk in enumerate(chat_chunks(server.answers.pop(0))):
                if server.cut_stream and number == 2:
                    return
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")

    return Handler


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    server = FakeServer("")
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(server))
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Oracle]:
    """A scripted server that answers; the key is in the environment, and result files go to a folder of their own."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setattr("step128_evals.metrics._SETTLE_SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    with serving(Oracle()) as server:
        yield server


@pytest.fixture
def ask(oracle: Oracle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run ``step128-eval tools`` against an oracle that answers perfectly, or spoiled; (exit code, report)."""
    oracle.respond = perfect()
    monkeypatch.setattr("os.fsync", lambda _: None)  # hundreds of items; on a busy disk that is most of the time

    def run(*options: str, spoil: Spoil | None = None) -> tuple[int, dict[str, Any]]:
        if spoil is not None:
            oracle.respond = perfect(spoil)
        code = main(["tools", "--base-url", oracle.url, "--json", "--out", "tools.jsonl", *options])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run
