"""What the middleware relies on in vLLM's own fetching of images: its list of hosts, no redirects, the same host."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from step128_launcher.access import AccessLimits
from step128_launcher.middleware.media import check_images

HOST = "images.example.org"
SPELLINGS = [
    f"http://{HOST}",
    f"https://{HOST}/a.png?x=1&y=%2e#f",
    f"HTTPS://{HOST.upper()}:443/a",
    f"http://{HOST}:80/",
    f"https://{HOST}?a=b@evil.org",
    f"https://{HOST}/@evil.org:1/..//x;y",
    f"https://{HOST}/%40evil.org",
    f"https://{HOST}/[a]",
]


@pytest.mark.parametrize("url", SPELLINGS)
def test_vllm_and_what_it_fetches_with_see_the_same_host(url: str) -> None:
    from urllib.parse import urlsplit

    from urllib3.util import parse_url
    from yarl import URL

    assert check_images([url], AccessLimits(media_domains=(HOST,))) == {HOST}
    assert parse_url(url).hostname == URL(parse_url(url).url).host == urlsplit(url).hostname == HOST
    assert URL(parse_url(url).url).port in (80, 443)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """A server that sends everyone on to /secret, and the paths it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(302 if self.path != "/secret" else 200)
            self.send_header("Location", "/secret")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield f"http://localhost:{server.server_port}/a.png", paths
    server.shutdown()
    server.server_close()


def _fetch(url: str, domain: str) -> None:
    from vllm.connections import HTTPConnection
    from vllm.multimodal.media import MediaConnector

    async def fetch() -> None:
        connection = HTTPConnection(reuse_client=True)
        try:
            await MediaConnector(connection=connection, allowed_media_domains=[domain]).fetch_image_async(url)
        finally:
            if connection._async_client is not None:
                await connection._async_client.close()

    asyncio.run(fetch())


@pytest.mark.parametrize(("allowed", "paths"), [("0", ["/a.png"]), ("1", ["/a.png", "/secret"])])
def test_redirects_are_followed_only_if_allowed(
    allowed: str, paths: list[str], asked: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", allowed)
    with pytest.raises(ValueError, match="image"):
        _fetch(asked[0], "localhost")
    assert asked[1] == paths


def test_other_hosts_are_not_asked(asked: tuple[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="allowed domains"):
        _fetch(asked[0], HOST)
    assert asked[1] == []
