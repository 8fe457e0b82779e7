"""A scripted OpenAI-like server: each test says what is answered, well or badly, and the score must be exactly that."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "secret"
MODEL = "oracle"
PIECE_CHARACTERS = 7


@dataclass
class Reply:
    """One answer.

    ``tool_calls`` are (name, arguments as sent). ``status`` other than 200 becomes an error body with ``text`` as its
    message. A stream waits ``first_delay_seconds`` before its first piece and ``piece_delay_seconds`` before each
    other, and ends with ``empty_pieces`` that show nothing. ``raw`` is sent instead of any JSON. ``cut_after``: the
    connection ends after so many pieces of a stream (of a whole answer: in its middle). ``body`` replaces the whole
    JSON answer of a request that is not a chat.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[tuple[str, str], ...] = ()
    finish_reason: str | None = None
    tokens: int | None = None
    status: int = 200
    delay_seconds: float = 0.0
    first_delay_seconds: float = 0.0
    piece_delay_seconds: float = 0.0
    empty_pieces: int = 0
    cut_after: int | None = None
    raw: str | None = None
    usage: bool = True
    body: dict[str, Any] | None = None
    call_ids: tuple[str, ...] | None = None

    @property
    def finish(self) -> str:
        return self.finish_reason or ("tool_calls" if self.tool_calls else "stop")


def words(text: str) -> list[int]:
    """The oracle's tokenizer: a token a word, number, space or sign; ids are stable."""
    return [sum(map(ord, part)) % 5000 + 10 for part in re.findall(r"\w+|[^\w\s]|\s+", text)]


@dataclass
class Oracle:
    """``respond(path, body)`` answers POSTs; None, or a None from it, leaves the answer to the defaults below.

    Defaults: a chat says "ok"; a completion says "x"; ``/tokenize`` knows vLLM's dialect. ``metrics`` is the text of
    ``/metrics``, or a function of the number of answers so far; None: 404. ``lacking`` paths are 404.
    """

    respond: Callable[[str, dict[str, Any]], Reply | None] | None = None
    context_tokens: int | None = 100_000
    bos: int | None = 1
    metrics: str | Callable[[int], str] | None = None
    lacking: frozenset[str] = frozenset()
    url: str = ""
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    connection_headers: set[str | None] = field(default_factory=set)
    answered: int = 0

    def chats(self) -> list[dict[str, Any]]:
        """The bodies of all chat requests so far."""
        return [body for path, body in self.requests if path == "/v1/chat/completions"]

    def reply(self, path: str, body: dict[str, Any]) -> Reply:
        reply = self.respond(path, body) if self.respond else None
        if reply is not None:
            return reply
        if path == "/tokenize":
            ids = words(body["prompt"])
            special = [self.bos] if body.get("add_special_tokens") and self.bos is not None else []
            return Reply(body={"tokens": special + ids, "count": len(special + ids)})
        return Reply("x" if path == "/v1/completions" else "ok")


def _usage(body: dict[str, Any], reply: Reply) -> dict[str, int]:
    prompt = body.get("prompt", "".join(str(message.get("content")) for message in body.get("messages", [])))
    count = len(prompt) if isinstance(prompt, list) else len(words(prompt))
    said = len(words(reply.text)) + len(words(reply.reasoning)) + sum(len(words(c[1])) + 1 for c in reply.tool_calls)
    tokens = said if reply.tokens is None else reply.tokens
    return {"prompt_tokens": count, "completion_tokens": tokens, "total_tokens": count + tokens}


def _calls(reply: Reply) -> list[dict[str, Any]]:
    ids = reply.call_ids or tuple(f"call-{number}" for number in range(len(reply.tool_calls)))
    return [
        {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for id, (name, arguments) in zip(ids, reply.tool_calls, strict=True)
    ]


def whole(path: str, body: dict[str, Any], reply: Reply) -> dict[str, Any]:
    """The JSON of an answer that is not streamed."""
    if reply.body is not None:
        return reply.body
    if path == "/v1/completions":
        choice: dict[str, Any] = {"index": 0, "text": reply.text, "finish_reason": reply.finish_reason or "length"}
    else:
        message: dict[str, Any] = {"role": "assistant", "content": reply.text or None}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.tool_calls:
            message["tool_calls"] = _calls(reply)
        choice = {"index": 0, "message": message, "finish_reason": reply.finish}
    usage = {"usage": _usage(body, reply)} if reply.usage else {}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice], **usage}


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS))


def chunks(path: str, body: dict[str, Any], reply: Reply) -> Iterator[dict[str, Any]]:
    """The objects of a streamed answer."""

    def chunk(choice: dict[str, Any]) -> dict[str, Any]:
        return {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": MODEL, "choices": [choice]}

    def delta(content: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return chunk({"index": 0, "delta": content, "finish_reason": finish})

    if path == "/v1/completions":
        for piece in _pieces(reply.text):
            yield chunk({"index": 0, "text": piece, "finish_reason": None})
        for _ in range(reply.empty_pieces):
            yield chunk({"index": 0, "text": "", "finish_reason": None})
        yield chunk({"index": 0, "text": "", "finish_reason": reply.finish_reason or "length"})
    else:
        for piece in _pieces(reply.reasoning):
            yield delta({"reasoning_content": piece})
        for piece in _pieces(reply.text):
            yield delta({"content": piece})
        for index, call in enumerate(_calls(reply)):
            head = {"name": call["function"]["name"], "arguments": ""}
            yield delta({"tool_calls": [{"index": index, "id": call["id"], "type": "function", "function": head}]})
            for piece in _pieces(call["function"]["arguments"]):
                yield delta({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
        for _ in range(reply.empty_pieces):
            yield delta({"content": ""})
        yield delta({}, reply.finish)
    if reply.usage:
        yield {**chunk({}), "choices": [], "usage": _usage(body, reply)}


def _handler(oracle: Oracle) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def send(self, status: int, content: str, content_type: str = "application/json", cut: bool = False) -> None:
            data = content.encode()
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)

        def refused(self) -> bool:
            if self.path in oracle.lacking:
                self.send(404, json.dumps({"error": {"message": "no such path"}}))
                return True
            if self.path.startswith("/v1") and self.headers.get("Authorization") != f"Bearer {KEY}":
                self.send(401, json.dumps({"error": {"message": "Unauthorized"}}))
                return True
            return False

        def do_GET(self) -> None:
            if self.refused():
                return
            if self.path == "/v1/models":
                entry = {"id": MODEL, "max_model_len": oracle.context_tokens}
                self.send(200, json.dumps({"object": "list", "data": [entry]}))
            elif self.path == "/metrics" and oracle.metrics is not None:
                text = oracle.metrics if isinstance(oracle.metrics, str) else oracle.metrics(oracle.answered)
                self.send(200, text, "text/plain")
            else:
                self.send(404, json.dumps({"error": {"message": "no such path"}}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.refused():
                return
            oracle.requests.append((self.path, body))
            oracle.connection_headers.add(self.headers.get("Connection"))
            reply = oracle.reply(self.path, body)
            if self.path.startswith("/v1"):
                oracle.answered += 1
            time.sleep(reply.delay_seconds)
            with suppress(BrokenPipeError, ConnectionResetError):  # the client went away, as some tests make it
                if reply.status != 200:
                    self.send(reply.status, json.dumps({"error": {"message": reply.text or "scripted failure"}}))
                elif reply.raw is not None:
                    self.send(200, reply.raw)
                elif body.get("stream"):
                    self.stream(body, reply)
                else:
                    self.send(200, json.dumps(whole(self.path, body, reply)), cut=reply.cut_after is not None)

        def stream(self, body: dict[str, Any], reply: Reply) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            if reply.cut_after is not None:  # promised and never sent: the client sees a broken connection
                self.send_header("Content-Length", "1000000")
            self.end_headers()
            for number, chunk in enumerate(chunks(self.path, body, reply)):
                if number == reply.cut_after:
                    return
                time.sleep(reply.piece_delay_seconds if number else reply.first_delay_seconds)
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")

    return Handler


@contextmanager
def serving(oracle: Oracle) -> Iterator[Oracle]:
    """Serve an oracle on a free port of 127.0.0.1 until the block ends."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(oracle))
    http.daemon_threads = True
    oracle.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield oracle
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
