"""The texts for nginx and Caddy in docs/remote-access.md, in the real programs: they stream, and let little by."""

from __future__ import annotations

import contextlib
import getpass
import http.server
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.client import HTTPSConnection
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/remote-access.md").read_text()
PAUSE_SECONDS = 0.6
NAME = "llm.example.org"
_PLACES = f"/usr/sbin:/usr/local/sbin:{os.environ.get('PATH', '')}"


def program(name: str) -> str:
    found = shutil.which(name, path=_PLACES)
    if found is None:
        pytest.skip(f"no {name} here (apt install {name}): its text in docs/remote-access.md is not tried")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Path and key of every request that came through.
SEEN: list[tuple[str, str | None]] = []


class Upstream(http.server.BaseHTTPRequestHandler):
    """Answers like the server: two events with a pause between them, and says what it was asked."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        SEEN.append((self.path, self.headers.get("Authorization")))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in (f"data: {len(body)}\n\n", "data: [DONE]\n\n"):
            self.wfile.write(f"{len(event):x}\r\n{event}\r\n".encode())
            self.wfile.flush()
            time.sleep(PAUSE_SECONDS)
        self.wfile.write(b"0\r\n\r\n")

    def do_GET(self) -> None:
        SEEN.append((self.path, self.headers.get("Authorization")))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[int]:
    SEEN.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", f"/CN={NAME}"]
    command += ["-addext", f"subjectAltName=DNS:{NAME}"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def snippet(kind: str, upstream: int) -> str:
    (text,) = re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)
    return str(text).replace("127.0.0.1:8000", f"127.0.0.1:{upstream}")


@pytest.fixture(params=["nginx", "caddy"])
def proxy(request: pytest.FixtureRequest, upstream: int, certificate: Path) -> Iterator[int]:
    port, folder = free_port(), certificate
    executable = program(request.param)
    if request.param == "nginx":
        text = re.sub(r"/etc/letsencrypt/live/\S+/fullchain.pem", f"{folder}/cert.pem", snippet("nginx", upstream))
        text = re.sub(r"/etc/letsencrypt/live/\S+/privkey.pem", f"{folder}/key.pem", text)
        text = text.replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl")
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        own = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
        head = f"user {getpass.getuser()}; daemon off; pid {folder}/pid; error_log stderr; events {{}}"
        head += f" http {{ access_log off; {own}"
        (folder / "nginx.conf").write_text(f"{head}\n{text}\n}}")
        command = [executable, "-p", str(folder), "-c", str(folder / "nginx.conf")]
        checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    else:
        text = snippet("caddy", upstream).replace(
            "{\n    servers", "{\n    admin off\n    auto_https off\n    servers", 1
        )
        text = re.sub(
            r"^(\w+\.example\.org) {", rf"https://\1:{port} {{\n    tls cert.pem key.pem", text, flags=re.MULTILINE
        )
        (folder / "Caddyfile").write_text(text)
        command = [executable, "run", "--config", "Caddyfile", "--adapter", "caddyfile"]
        validate = [executable, "validate", "--config", "Caddyfile", "--adapter", "caddyfile"]
        checked = subprocess.run(validate, cwd=folder, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env={"HOME": str(folder), "PATH": _PLACES}
        )
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            assert time.monotonic() < deadline and process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
    yield port
    process.terminate()
    process.wait(timeout=20)


class Connection(HTTPSConnection):
    """To the proxy at 127.0.0.1 by its public name, which the certificate is for."""

    def __init__(self, port: int, folder: Path) -> None:
        super().__init__(NAME, port, timeout=20, context=ssl.create_default_context(cafile=str(folder / "cert.pem")))

    def connect(self) -> None:
        plain = socket.create_connection(("127.0.0.1", self.port), self.timeout)
        self.sock = self._context.wrap_socket(plain, server_hostname=NAME)  # type: ignore[attr-defined]


def test_answers_stream_with_the_key_and_nothing_else_gets_by(proxy: int, certificate: Path) -> None:
    client = Connection(proxy, certificate)
    headers = {"Authorization": "Bearer key", "Content-Type": "application/json"}
    client.request("POST", "/v1/chat/completions?a=%2F", b"x" * 3_000_000, headers)
    answer = client.getresponse()
    assert answer.status == 200
    first, started = answer.readline(), time.monotonic()
    assert first == b"data: 3000000\n"
    assert b"[DONE]" in answer.read()
    assert time.monotonic() - started > 0.5 * PAUSE_SECONDS  # it came before the second event was made
    assert SEEN == [("/v1/chat/completions?a=%2F", "Bearer key")]

    def status(path: str, megabytes: int = 0) -> int:
        asking = Connection(proxy, certificate)
        asking.putrequest("POST" if megabytes else "GET", path)
        if megabytes:
            asking.putheader("Content-Length", str(megabytes * 2**20))
        asking.endheaders()
        with contextlib.suppress(OSError):  # it may be refused before all of it was sent
            for _ in range(16 * megabytes):
                asking.send(bytes(65536))
        return asking.getresponse().status

    assert status("/health") == 200
    assert {status(path) for path in ("/metrics", "/invocations", "/docs", "/")} == {404}
    assert [path for path, _ in SEEN[1:]] == ["/health"]
    assert status("/v1/completions", 65) in (413, 502)  # 502: Caddy 2.6, which notices on the way
