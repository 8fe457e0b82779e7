"""Who may ask for what: routes, spellings of a path, methods, keys; and what every answer carries."""

import ast
import asyncio
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asgi_requests import Answer, ask, bearer
from prometheus_client import REGISTRY

from step128_launcher.access import ACCESS_VARIABLE, METRICS_TOKEN_VARIABLE, AccessLimits
from step128_launcher.middleware import Guard, keys
from step128_launcher.middleware.routes import ROUTES, Access

BODY = b'{"model": "m", "messages": []}'
MakeGuard = Callable[..., Guard]


class Inner:
    """Stands in for vLLM: answers 200 and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope.get("path", scope["type"]))
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"cache-control", b"no-cache")]})
            await send({"type": "http.response.body", "body": b"{}"})


@pytest.fixture
def inner() -> Inner:
    return Inner()


@pytest.fixture
def guard(inner: Inner, monkeypatch: pytest.MonkeyPatch) -> Guard:
    monkeypatch.setenv("VLLM_API_KEY", "the-key")
    monkeypatch.setenv(METRICS_TOKEN_VARIABLE, "the-token")
    monkeypatch.setenv(ACCESS_VARIABLE, AccessLimits().to_json())
    return Guard(inner)


def refused(reason: str) -> float:
    return REGISTRY.get_sample_value("step128_requests_refused_total", {"reason": reason}) or 0.0


CREDENTIALS = {"nothing": [], "wrong": bearer("x"), "key": bearer("the-key"), "token": bearer("the-token")}
EXPECTED = {
    Access.OPEN: {"nothing": 200, "wrong": 200, "key": 200, "token": 200},
    Access.METRICS: {"nothing": 401, "wrong": 401, "key": 200, "token": 200},
    Access.API: {"nothing": 401, "wrong": 401, "key": 200, "token": 401},
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("credential", CREDENTIALS)
def test_each_route_with_each_key(path: str, credential: str, guard: Guard, inner: Inner) -> None:
    route = ROUTES[path]
    answer = ask(guard, route.method, path, CREDENTIALS[credential], BODY if route.method == "POST" else b"")
    assert answer.status == EXPECTED[route.access][credential]
    assert inner.asked == ([path] if answer.status == 200 else [])


UNSERVED = [
    *("/", "/v1", "/v1/", "//v1/models", "/v1//models", "/v1/models/", "/v1/models/x", "/v1/../metrics"),
    *("/v1/./models", "/V1/MODELS", "/v1/Models", "/metrics/", "/metrics/x", "/metricsx", "/metrics/../v1/models"),
    *("/health/", "/healthz", "/health/../v1/models", "/health;a", "/v1/models;a", "/v1/embeddings", "/v1/files"),
    *("/v1/audio/transcriptions", "/v1/messages", "/v1/realtime", "/v1/responses/resp_1"),
    *("/v1/responses/resp_1/cancel", "/v1/chat/completions/batch", "/v1/chat/completions/render", "/invocations"),
    *("/ping", "/version", "/load", "/docs", "/redoc", "/openapi.json", "/static/x", "/collective_rpc", "/sleep"),
    *("/start_profile", "/server_info"),
]


@pytest.mark.parametrize(
    "path", [*UNSERVED, "/v1/models\n", "/v1/models\x00", " /v1/models", "/\uff561/models", "*", ""]
)
def test_everything_else_is_not_there_even_with_the_key(path: str, guard: Guard, inner: Inner) -> None:
    before = refused("not_served")
    for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE"):
        answer = ask(guard, method, path, bearer("the-key"), BODY)
        assert answer.status == 404 and "does not serve this path" in answer.message
    assert not inner.asked and refused("not_served") == before + 6


@pytest.mark.parametrize("raw", [b"/%76%31/models", b"/v1%2Fmodels", b"/v1/model%73", b"/v1/models%00"])
def test_a_path_is_spelled_plainly(raw: bytes, guard: Guard, inner: Inner) -> None:
    """The server hands on what it decoded; a proxy before it may have judged what was sent."""
    assert ask(guard, "GET", "/v1/models", bearer("the-key"), raw_path=raw).status == 404 and not inner.asked


@pytest.mark.parametrize("path", ROUTES)
def test_other_methods(path: str, guard: Guard, inner: Inner) -> None:
    for method in {"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE"} - {ROUTES[path].method}:
        answer = ask(guard, method, path, bearer("the-key"), BODY)
        assert answer.status == 405 and answer.headers[b"allow"] == ROUTES[path].method.encode()
        if ROUTES[path].access is not Access.OPEN:
            assert ask(guard, method, path, (), BODY).status == 401
    assert not inner.asked


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", b"Basic the-key")],
        [(b"authorization", b"the-key")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearer the-key ")],
        [(b"authorization", b"Bearer  the-key")],
        [(b"authorization", b"Bearer the-ke")],
        [(b"authorization", b"Bearer the-key\xff")],
        [*bearer("x"), *bearer("the-key")],
        [*bearer("the-key"), *bearer("the-key")],
        [(b"x-api-key", b"the-key")],
        [(b"cookie", b"authorization=Bearer the-key")],
        [(b"proxy-authorization", b"Bearer the-key")],
    ],
)
def test_what_is_no_key(headers: list[tuple[bytes, bytes]], guard: Guard, inner: Inner) -> None:
    answer = ask(guard, "GET", "/v1/models", headers)
    assert answer.status == 401 and answer.headers[b"www-authenticate"] == b"Bearer" and not inner.asked
    assert b"the-key" not in answer.body


def test_the_scheme_s_case_does_not_matter(guard: Guard) -> None:
    assert ask(guard, "GET", "/v1/models", [(b"authorization", b"bearer the-key")]).status == 200


def test_without_a_token_metrics_needs_the_key(guard: Guard, inner: Inner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(METRICS_TOKEN_VARIABLE)
    for value in (None, ""):
        if value is not None:
            monkeypatch.setenv(METRICS_TOKEN_VARIABLE, value)
        alone = Guard(inner)
        answers = [ask(alone, "GET", "/metrics", headers).status for headers in CREDENTIALS.values()]
        assert answers == [401, 401, 200, 401]
        assert ask(alone, "GET", "/metrics", [(b"authorization", b"Bearer ")]).status == 401


@pytest.mark.parametrize(
    ("variable", "value", "error"),
    [
        ("VLLM_API_KEY", None, KeyError),
        ("VLLM_API_KEY", "", ValueError),
        (ACCESS_VARIABLE, None, KeyError),
        (ACCESS_VARIABLE, "", ValueError),
        (ACCESS_VARIABLE, '{"media_domains": [], "max_everything": 1}', TypeError),
    ],
)
def test_it_does_not_start_without_what_it_needs(
    variable: str, value: str | None, error: type[Exception], guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, value)
    with pytest.raises(error):
        Guard(Inner())


def test_wrong_keys_are_counted_and_said_once_a_minute(
    guard: Guard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(keys.time, "monotonic", lambda: now)
    # What vLLM made of the log, if a test before this one imported it.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="vllm.step128")
    before, unasked = refused("wrong_key"), refused("no_key")
    for _ in range(5):
        ask(guard, "GET", "/v1/models", bearer("guess-4711"))
    ask(guard, "GET", "/v1/models")
    now = 1061.0
    ask(guard, "GET", "/v1/models", bearer("guess-4711"))
    assert refused("wrong_key") == before + 6 and refused("no_key") == unasked + 1
    said = [record.getMessage() for record in caplog.records]
    assert said == ["step128: requests with a wrong key: 1.", "step128: requests with a wrong key: 5."]
    assert "guess" not in caplog.text and "the-key" not in caplog.text


def test_a_websocket_is_closed_before_it_opens(guard: Guard, inner: Inner) -> None:
    for path in ("/v1/realtime", "/v1/models", "/health"):
        assert ask(guard, "GET", path, bearer("the-key"), kind="websocket").closed == 1008
    assert not inner.asked


def test_the_server_s_own_start_and_end_pass(guard: Guard, inner: Inner) -> None:
    asyncio.run(guard({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert inner.asked == ["lifespan"]


def _answers(guard: Guard) -> list[Answer]:
    return [ask(guard, "GET", "/health"), ask(guard, "GET", "/docs"), ask(guard, "GET", "/v1/models")]


def test_headers_of_every_answer(guard: Guard) -> None:
    for answer in _answers(guard):
        assert answer.headers[b"x-content-type-options"] == b"nosniff"
        assert answer.headers[b"content-security-policy"].startswith(b"default-src 'none'")
        assert answer.headers[b"referrer-policy"] == b"no-referrer"
        assert not any(name.startswith(b"access-control-") for name in answer.headers)
    kept, *ours = (answer.headers[b"cache-control"] for answer in _answers(guard))
    assert kept == b"no-cache" and ours == [b"no-store", b"no-store"]


def test_a_refusal_looks_like_openai_s(guard: Guard) -> None:
    error = json.loads(ask(guard, "GET", "/v1/models").body)["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["code"] == 401


def test_it_brings_nothing_heavy_into_vllm_s_process() -> None:
    package = Path(sys.modules[Guard.__module__].__file__ or "").parent
    for path in (*package.glob("*.py"), package.parent / "access.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                ours = name == "step128_launcher.access" or name.startswith("step128_launcher.middleware")
                assert ours or name.split(".")[0] in {*sys.stdlib_module_names, "prometheus_client"}, (path, name)
