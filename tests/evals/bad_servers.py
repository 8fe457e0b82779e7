"""Servers that are no OpenAI endpoint at all: each answers every request with the same bytes, or none."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def http(status: str, body: str, *headers: str) -> bytes:
    """A whole HTTP answer."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body.encode())}", "Connection: close", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


HTML = http("200 OK", "<!doctype html><title>nginx</title>", "Content-Type: text/html")
RESET, SILENT = b"reset", b"silent"
JSON = "Content-Type: application/json"

SERVERS = {
    "html": HTML,
    "html 404": http("404 Not Found", "<h1>not here</h1>", "Content-Type: text/html"),
    "redirect": http("307 Temporary Redirect", "", "Location: http://127.0.0.1:9/v1/models"),
    "redirect to itself": http("302 Found", "", "Location: /v1/models"),
    "401": http("401 Unauthorized", '{"error": {"message": "bad key"}}', JSON),
    "403 without a body": http("403 Forbidden", ""),
    "429": http("429 Too Many Requests", '{"error": {"message": "slow down"}}', JSON, "Retry-After: 9"),
    "500": http("500 Internal Server Error", "oops"),
    "503": http("503 Service Unavailable", '{"detail": "loading model"}', JSON),
    "no json": http("200 OK", "{", JSON),
    "a list": http("200 OK", "[]", JSON),
    "null": http("200 OK", "null", JSON),
    "no models": http("200 OK", '{"object": "list", "data": []}', JSON),
    "strange models": http("200 OK", '{"data": ["a", 1]}', JSON),
    "cut": b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{",
    "no http": b"SSH-2.0-OpenSSH_9.2\r\n",
    "nothing": b"",
    "reset": RESET,
    "silent": SILENT,
}


@contextmanager
def bad_server(answer: bytes) -> Iterator[str]:
    """Serve on a free port until the block ends; gives the base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def talk(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(65536)
            if answer == SILENT:
                ended.wait(20)
            elif answer == RESET:  # closing with unsent time 0 sends RST instead of FIN
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                connection.sendall(answer)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
