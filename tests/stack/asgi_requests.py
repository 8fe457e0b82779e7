"""Ask an ASGI application without a network: with exactly the path, headers and pieces of a body a test wants."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What came back; `closed` for a websocket that was not accepted."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    closed: int | None = None

    @property
    def message(self) -> str:
        """The sentence of a refusal."""
        return str(json.loads(self.body)["error"]["message"])

    @property
    def reason(self) -> str:
        return str(json.loads(self.body)["error"]["type"])


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + key.encode())]


async def ask_async(
    app: Any,
    method: str,
    path: str,
    headers: Sequence[tuple[bytes, bytes]] = (),
    body: bytes | Sequence[bytes] = b"",
    raw_path: bytes | None = None,
    kind: str = "http",
) -> Answer:
    pieces = [body] if isinstance(body, bytes) else list(body)
    scope = {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode() if raw_path is None else raw_path,
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), *headers],
        "client": ("127.0.0.1", 40000),
        "server": ("127.0.0.1", 8000),
        "state": {},
    }
    answer, over = Answer(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status, answer.headers = message["status"], dict(message.get("headers", []))
        elif message["type"] == "http.response.body":
            answer.body += message.get("body", b"")
            if not message.get("more_body", False):
                over.set()
        elif message["type"] == "websocket.close":
            answer.closed = message["code"]

    await app(scope, receive, send)
    return answer


def ask(app: Any, method: str, path: str, *arguments: Any, **named: Any) -> Answer:
    """The same, from a test that is no coroutine."""
    return asyncio.run(ask_async(app, method, path, *arguments, **named))
