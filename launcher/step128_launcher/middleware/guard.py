"""The middleware itself: route, key, method, body, contents, in this order; then vLLM."""

from __future__ import annotations

import json
import os

from prometheus_client import Counter

from step128_launcher.access import ACCESS_VARIABLE, AccessLimits
from step128_launcher.middleware.addresses import check_host
from step128_launcher.middleware.amounts import check_amounts, parse_request
from step128_launcher.middleware.asgi import (
    App,
    ClientGoneError,
    Message,
    Reason,
    Receive,
    RequestRefusedError,
    Scope,
    Send,
)
from step128_launcher.middleware.body import read_body, replay
from step128_launcher.middleware.keys import Keys
from step128_launcher.middleware.media import check_images, find_images
from step128_launcher.middleware.routes import find_route

# In the registry of vLLM's process, so vLLM's /metrics shows it.
_refusals = Counter("step128_requests_refused", "Requests that were refused before vLLM saw them.", ["reason"])
for _reason in Reason:
    _refusals.labels(_reason.value)

# Answers are for programs: a browser shall neither keep, guess, frame nor run them.
_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


class Guard:
    """Lets through what `routes` lists, with the right key, within the limits; refuses everything else.

    No cross-origin access is given: an OPTIONS request is refused like any other method that a route does not have.

    Raises:
        KeyError, ValueError, TypeError: when made without VLLM_API_KEY and STEP128_ACCESS in the environment, as the
            launcher sets them; the server then does not start.

    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._keys = Keys(os.environ)
        self._limits = AccessLimits.from_json(os.environ[ACCESS_VARIABLE])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._answer(scope, receive, _with_headers(send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            receive = await self._admit(scope, receive)
        except RequestRefusedError as refusal:
            _refusals.labels(refusal.reason.value).inc()
            await _refuse(send, refusal)
        except ClientGoneError:
            return
        else:
            await self._app(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive) -> Receive:
        """Return the `receive` for vLLM."""
        route = find_route(scope)
        self._keys.check(route.access, scope)
        if scope["method"] != route.method:
            allow = ((b"allow", route.method.encode()),)
            raise RequestRefusedError(405, Reason.METHOD, f"This path takes {route.method} only.", allow)
        if route.method == "GET":
            return receive
        body = await read_body(scope, receive, self._limits.max_body_bytes)
        document = parse_request(body)
        check_amounts(document, self._limits)
        for host in check_images(find_images(document), self._limits):
            await check_host(host)
        return replay(body, receive)


async def _refuse(send: Send, refusal: RequestRefusedError) -> None:
    error = {"message": refusal.message, "type": refusal.reason.value, "param": None, "code": refusal.status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *refusal.headers]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            present = {name.lower() for name, _ in headers}
            message = {**message, "headers": headers + [pair for pair in _HEADERS if pair[0] not in present]}
        await send(message)

    return send_with_headers
