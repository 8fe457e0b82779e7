"""Images in requests: what passes, what is fetched from where, and that nothing else gets through in any field."""

import asyncio
import base64
import json
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from asgi_requests import Answer, ask, bearer

from step128_launcher.access import ACCESS_VARIABLE, AccessLimits
from step128_launcher.middleware import Guard
from step128_launcher.middleware.addresses import is_public

PNG = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(20)).decode()
INNER = "http://169.254.169.254/latest/meta-data"
LIMITS = AccessLimits(max_images=2, max_image_bytes=100)
OPEN = replace(LIMITS, media_domains=("images.example.org", "cdn.example.org"))
Post = Callable[..., Answer]


@pytest.fixture
def post(monkeypatch: pytest.MonkeyPatch) -> Post:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": (await receive())["body"]})

    def do(document: Any, limits: AccessLimits = LIMITS, path: str = "/v1/chat/completions") -> Answer:
        monkeypatch.setenv("VLLM_API_KEY", "k")
        monkeypatch.setenv(ACCESS_VARIABLE, limits.to_json())
        return ask(Guard(app), "POST", path, bearer("k"), json.dumps(document).encode())

    return do


def chat(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(parts)}]}


def image(url: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}} | fields


TEXT = {"type": "text", "text": f"What about {INNER} and image_url?"}


def test_images_in_the_request_pass(post: Post) -> None:
    answered = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": PNG}]}
    for document in (
        chat(TEXT, image(PNG), image(PNG, detail="high")),
        chat({"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}),
        chat(image(PNG), role="tool"),
        {
            "input": [
                {"role": "user", "content": [{"type": "input_image", "detail": "auto", "image_url": PNG}]},
                answered,
            ]
        },
        {"messages": [{"role": "user", "content": "text"}, {"role": "assistant", "content": None}]},
        chat("plain", TEXT),
        {"input": [{"content": [{"type": "input_image", "detail": "auto", "file_id": None, "image_url": PNG}]}]},
        {"input": "text"},
    ):
        assert post(document).status == 200, document


def test_a_schema_may_have_such_names(post: Post) -> None:
    schema = {"type": "object", "properties": {"image_url": {"type": "string"}, "file_id": {}}}
    function = {"name": "see", "parameters": schema}
    call = {"type": "function", "function": {"name": "see", "arguments": json.dumps({"image_url": INNER})}}
    document = {
        "messages": [{"role": "assistant", "tool_calls": [call]}],
        "tools": [{"type": "function", "function": function}],
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
    }
    assert post(document).status == 200


def test_how_many(post: Post) -> None:
    messages = [message for _ in range(3) for message in chat(image(PNG))["messages"]]
    answer = post({"messages": messages})
    assert answer.status == 400 and answer.message.startswith("The request holds 3 images; this server takes at most 2")
    assert post({"messages": messages[:2]}).status == 200
    assert "text only" in post(chat(image(PNG)), replace(LIMITS, max_images=0)).message
    assert post(chat(TEXT), replace(LIMITS, max_images=0)).status == 200


def test_how_large(post: Post) -> None:
    for size, status in ((100, 200), (103, 413)):
        data = base64.b64encode(b"\xff\xd8\xff" + bytes(size - 3)).decode().rstrip("=")
        assert post(chat(image("data:image/jpeg;base64," + data))).status == status


def _data(content: bytes, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(content).decode()


def test_formats(post: Post) -> None:
    for good in (b"\xff\xd8\xff\xe0", b"GIF87a", b"GIF89a", b"RIFF\x00\x00\x00\x00WEBPVP8 "):
        assert post(chat(image(_data(good + bytes(12))))).status == 200
    assert post(chat(image(PNG.replace("data:image/png", "DATA:IMAGE/PNG")))).status == 200
    for bad in (
        _data(b"%!PS-Adobe-3.0 EPSF-3.0"),
        _data(b"BM" + bytes(20)),
        _data(b"RIFF\x00\x00\x00\x00AVI LIST"),
        _data(b"\x93NUMPY" + bytes(20)),
        _data(b""),
        "data:image/png;base64,%89PNG%0D%0A",
        "data:image/png,abc",
        "data:image/png;charset=x;base64," + PNG[22:],
        "data:audio/wav;base64," + PNG[22:],
        "data:;base64," + PNG[22:],
        "data:",
        "DATA:text/html;base64," + PNG[22:],
        "data:image/png;base64," + " " + PNG[22:],
    ):
        answer = post(chat(image(bad)))
        assert answer.status == 400 and answer.reason == "media", bad


HIDDEN = [
    image(INNER),
    {"type": "image_url", "image_url": INNER},
    {"image_url": INNER},
    {"image_url": {"url": INNER}},
    {"type": "text", "text": "x", "uuid": "", "image_url": INNER},
    {"type": "text", "text": "x", "image_url": PNG},
    {"type": None, "image_url": INNER},
    {"type": ["text"], "image_url": INNER},
    image(PNG, uuid="another's"),
    {"type": "image_url", "uuid": "another's"},
    {"type": "image_url", "image_url": None, "uuid": "another's"},
    {"type": "image_url", "image_url": {"url": PNG, "path": "/etc/passwd"}},
    {"type": "image_url", "image_url": {}},
    {"type": "image_url", "image_url": [PNG]},
    {"type": "input_image", "file_id": "file-1"},
    {"type": "input_image", "image_url": PNG, "file_id": "file-1"},
    {"type": "video_url", "video_url": {"url": INNER}},
    {"video_url": INNER},
    {"type": "text", "uuid": "x", "video_url": PNG},
    {"type": "audio_url", "audio_url": {"url": INNER}},
    {"audio_url": INNER},
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    {"input_audio": {"data": "AAAA", "format": "wav"}},
    {"type": "file", "file": {"file_id": "file-1"}},
    {"type": "input_file", "file_url": INNER},
    {"type": "image_file", "image_file": {"path": "x"}},
    {"type": "image_embeds", "image_embeds": "AAAA"},
    {"image_embeds": None, "uuid": "another's"},
    {"type": "prompt_embeds", "data": "AAAA"},
    {"type": "computer_call_output", "output": {"type": "computer_screenshot", "image_url": INNER}},
]


@pytest.mark.parametrize("limits", [LIMITS, OPEN])
@pytest.mark.parametrize("part", HIDDEN)
def test_nothing_is_fetched_or_smuggled(part: dict[str, Any], limits: AccessLimits, post: Post) -> None:
    """Not in a message, nor wherever else an object may stand: fields that a later vLLM may read as messages."""
    for document in (
        chat(TEXT, part),
        {"input": [part]},
        {"input": [{"type": "function_call_output", "output": [part]}]},
        {"previous_input_messages": [{"role": "user", "content": [part]}]},
        {"messages": [{"role": "user", "content": part}]},
        {"chat_template_kwargs": {"deep": [[{"er": [part]}]]}},
    ):
        answer = post(document, limits)
        assert answer.status == 400 and answer.reason == "media"


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What each host resolves to; a host that is not here does not exist."""
    known: dict[str, list[str]] = {}

    async def getaddrinfo(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        if host not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known[host]]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return known


REMOTE = [
    "http://images.example.org",
    "https://images.example.org/a.png?x=1&y=%2e#f",
    "HTTPS://Images.Example.ORG:443/a",
    "http://cdn.example.org:80/",
    "https://cdn.example.org?a",
]


def test_without_leave_nothing_is_fetched(post: Post, resolver: dict[str, list[str]]) -> None:
    for url in (*REMOTE, "file:///etc/passwd", "ftp://x", "//images.example.org/a", "images.example.org", ""):
        answer = post(chat(image(url)))
        assert answer.status == 400 and "fetches no images" in answer.message and "data:image/png" in answer.message


@pytest.mark.parametrize("url", REMOTE)
def test_from_allowed_hosts(url: str, post: Post, resolver: dict[str, list[str]]) -> None:
    resolver |= {host: ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"] for host in OPEN.media_domains}
    for path in ("/v1/chat/completions", "/tokenize", "/v1/responses"):
        assert post(chat(image(url)), OPEN, path).status == 200


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example.org/a",
        "https://example.org/a",
        "https://evilimages.example.org/a",
        "https://images.example.org.evil.org/a",
        "https://images.example.org./a",
        "https://evil.org/images.example.org",
        "https://evil.org#images.example.org",
        "https://images.example.org@evil.org/a",
        "https://evil.org\\@images.example.org/a",
        "https://images.example.org\\@evil.org/a",
        "https://images.example.org%2f@evil.org/a",
        "https://user:x@images.example.org/a",
        "https://images.example.org:8080/a",
        "https://images.example.org:22/a",
        "https://images.example.org:443@evil.org/",
        "https://images.example.org /a",
        " https://images.example.org/a",
        "https://images.example.org/a\nHost: x",
        "https://images.example.org/a\n",
        "https://\uff49mages.example.org/a",
        "http:images.example.org/a",
        "http:///images.example.org/a",
        "file://images.example.org/etc/passwd",
        "gopher://images.example.org/",
        "https://127.0.0.1/a",
        "https://[::1]/a",
        "https://2130706433/a",
        "https://0x7f.1/a",
        "/etc/passwd",
    ],
)
def test_urls_that_only_look_allowed(url: str, post: Post, resolver: dict[str, list[str]]) -> None:
    resolver |= {"images.example.org": ["93.184.215.14"], "cdn.example.org": ["93.184.215.14"]}
    answer = post(chat(image(url)), OPEN)
    assert answer.status == 400 and answer.reason == "media"


PRIVATE = [
    *("10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "127.0.0.1", "127.1.2.3", "0.0.0.0"),
    *("169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1"),
    *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0"),
    *("fc00::1", "fd12:3456::1", "fec0::1", "ff02::1", "ff0e::1", "2001:db8::1", "::ffff:93.184.215.14"),
    *("::ffff:127.0.0.1", "::ffff:a00:1", "::127.0.0.1", "2002:7f00:1::", "2002:5db8:d70e::", "2001:0:53aa:64c::1"),
    *("64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b:1::1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str, post: Post, resolver: dict[str, list[str]]) -> None:
    assert not is_public(address)
    resolver |= {"images.example.org": ["93.184.215.14", address]}
    answer = post(chat(image(REMOTE[0])), OPEN)
    assert answer.status == 400 and "not on the public internet" in answer.message


def test_public_addresses() -> None:
    for address in ("93.184.215.14", "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::1.1.1.1", "172.32.0.1"):
        assert is_public(address)


def test_a_host_that_cannot_be_resolved(post: Post, resolver: dict[str, list[str]]) -> None:
    assert "cannot be resolved" in post(chat(image(REMOTE[0])), OPEN).message
    resolver["images.example.org"] = []
    assert post(chat(image(REMOTE[0])), OPEN).status == 400
