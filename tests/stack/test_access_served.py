"""Access to a real server: the matrix of test_auth_matrix.py again, and what only a network and an engine show."""

import base64
import http.client
import json
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launched import Server, descendants, launch
from vllm_routes import BODIES, CHAT, KEYS, REFUSED, concrete, expected

from step128_launcher.middleware.routes import ROUTES


@pytest.fixture(scope="module")
def server(quantized: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("matrix")
    for name, content in (("key", "the-key"), ("token", "the-token")):
        (folder / name).write_text(content)
    options = ["--api-key-file", str(folder / "key"), "--metrics-token-file", str(folder / "token")]
    options += ["--served-model-name", "tiny", "--max-tokens-per-request", "24", "--max-images", "2"]
    options += ["--max-body-size", "1MiB", "--max-image-pixels", "1000000"]
    with launch(quantized("all"), folder, options) as running:
        yield running


def send(
    server: Server, method: str, path: str, key: str | None = "the-key", body: Any = None, **headers: str
) -> tuple[int, bytes]:
    port = int(server.url.rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.putrequest(method, path, skip_accept_encoding=True)
    chunked = data is not None and not isinstance(data, bytes)
    for name, value in (headers | {"Content-Type": "application/json"}).items():
        connection.putheader(name.replace("_", "-"), value)
    if chunked:
        connection.putheader("Transfer-Encoding", "chunked")
    elif data is not None:
        connection.putheader("Content-Length", str(len(data)))
    connection.endheaders(data, encode_chunked=chunked)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


@pytest.mark.serve
def test_matrix_against_a_server(server: Server, measured: Callable[[str], None]) -> None:
    seen = 0
    for path in (*ROUTES, *REFUSED):
        method = ROUTES[path].method if path in ROUTES else "POST"
        for name, key in KEYS.items():
            for asked in {method, "GET", "OPTIONS"}:
                body = BODIES.get(path, CHAT) if asked == "POST" else None
                status, content = send(server, asked, concrete(path), key, body)
                assert status == (expected(path, asked, name) or 200), (path, asked, name, content)
                seen += 1
    measured(f"auth matrix: {seen} requests to {len(ROUTES) + len(REFUSED)} paths with 4 keys answered as decided")


@pytest.mark.serve
def test_spellings_of_a_path(server: Server) -> None:
    paths = ["//v1/models", "/v1/../metrics", "/v1/%6dodels", "/%76%31/models", "/v1/models/", "/v1/models%00"]
    paths += ["/metrics/", "/metricsx", "/health/", "/v1/models;x", "/v1/./models", "/v1/models%3fa", "/v1%2fmodels"]
    for path in paths:
        assert send(server, "GET", path)[0] == 404, path
    assert send(server, "GET", "/v1/models?key=x#y")[0] in (200, 404)
    assert send(server, "GET", "/v1/models?limit=1")[0] == 200


@pytest.mark.serve
def test_a_browser_gets_nothing(server: Server) -> None:
    preflight = {"Origin": "https://example.org", "Access_Control_Request_Method": "POST"}
    assert send(server, "OPTIONS", "/v1/chat/completions", None, **preflight)[0] == 401
    port = int(server.url.rpartition(":")[2])
    for path in ("/v1/realtime", "/v1/models"):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
            lines = [f"GET {path} HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade"]
            lines += ["Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Version: 13"]
            raw.sendall("\r\n".join([*lines, "Authorization: Bearer the-key", "", ""]).encode())
            assert b" 403 " in raw.recv(200).partition(b"\r\n")[0]
    port_headers = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    port_headers.request("GET", "/health", headers={"Origin": "https://example.org"})
    answer = port_headers.getresponse()
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def _resident_bytes(server: Server) -> int:
    pid = json.loads((server.state / "status.json").read_text())["vllm_pid"]
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.serve
def test_large_bodies(server: Server) -> None:
    """Declared and streamed, with the key and without: refused, and kept nowhere."""
    piece = b" " * 65536
    before = _resident_bytes(server)
    for key, status in (("the-key", 413), ("wrong", 401)):
        assert send(server, "POST", "/v1/completions", key, piece * 320)[0] == status
        assert send(server, "POST", "/v1/completions", key, iter([piece] * 320))[0] == status
    assert _resident_bytes(server) - before < 16 << 20
    assert send(server, "POST", "/v1/completions", body=BODIES["/v1/completions"])[0] == 200


@pytest.mark.serve
def test_tokens_are_bounded_when_no_number_is_named(server: Server) -> None:
    for path, number in (("/v1/chat/completions", "max_completion_tokens"), ("/v1/responses", "max_output_tokens")):
        endless = {key: value for key, value in BODIES[path].items() if not key.startswith("max_")}
        endless |= {"ignore_eos": True, "temperature": 0}
        status, content = send(server, "POST", path, body=endless)
        usage = json.loads(content)["usage"]
        assert status == 200 and usage.get("completion_tokens", usage.get("output_tokens")) <= 24
        status, content = send(server, "POST", path, body=endless | {number: 25})
        assert status == 400 and b"at most 24 tokens" in content


def _png(width: int, height: int) -> str:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(height * (width + 1)))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


@pytest.mark.serve
def test_images(server: Server) -> None:
    def see(*urls: str) -> tuple[int, bytes]:
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return send(
            server, "POST", "/v1/chat/completions", body=CHAT | {"messages": [{"role": "user", "content": parts}]}
        )

    assert see(_png(64, 64))[0] == 200
    status, content = see(_png(2000, 2000))  # 4 million pixels in 5 kB
    assert status == 400 and b"exceed the maximum of 1000000 pixels" in content
    assert see(_png(8, 8), _png(8, 9), _png(9, 8))[0] == 400
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(1.0)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        status, content = see(url)
        assert status == 400 and b"fetches no images" in content
        hidden = {"type": "text", "text": "x", "uuid": "", "image_url": url}
        for path, body in (
            ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": [hidden]}]}),
            ("/tokenize", {"messages": [{"role": "user", "content": [hidden]}]}),
            ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]}),
        ):
            assert send(server, "POST", path, body=body)[0] == 400
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.serve
def test_what_is_counted_and_what_is_logged(server: Server) -> None:
    secret = "a prompt that nobody shall find in a log 4711"
    assert send(server, "POST", "/v1/completions", body={"prompt": secret, "max_tokens": 2})[0] == 200
    assert send(server, "POST", "/v1/completions", body={"prompt": secret, "max_tokens": "x"})[0] == 400
    assert send(server, "POST", "/v1/completions", body={"prompt": {"a": secret}})[0] == 400
    assert send(server, "POST", f"/v1/models?{secret.replace(' ', '+')}", "guess-4711")[0] == 401
    metrics = send(server, "GET", "/metrics", "the-token")[1].decode()
    for reason in ("wrong_key", "request"):
        counted = f'step128_requests_refused_total{{reason="{reason}"}} '
        assert float(metrics.partition(counted)[2].split()[0]) >= 1
    logs = server.log.read_text() + "".join(path.read_text(errors="replace") for path in server.state.glob("vllm.log*"))
    for word in (secret, secret.replace(" ", "+"), "the-key", "the-token", "guess-4711"):
        assert word not in logs, word
    assert "requests with a wrong key" in logs
    for pid in (server.process.pid, *descendants(server.process.pid)):
        argv = Path(f"/proc/{pid}/cmdline").read_text()
        assert "the-key" not in argv and "the-token" not in argv
