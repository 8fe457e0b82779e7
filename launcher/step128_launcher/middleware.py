"""ASGI middleware that vLLM's API server loads by name: the API key for every path but those a monitor needs.

vLLM 0.32 asks for the key below /v1, /v2, /inference and /cohere only; /invocations, for one, generates text without
it. This runs inside vLLM's process, so it imports nothing of vLLM and nothing of the launcher.
"""

import hashlib
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

OPEN_PATHS = frozenset({"/health", "/metrics", "/ping"})

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class RequireApiKey:
    """Answers 401 to any request outside OPEN_PATHS that does not carry the key of VLLM_API_KEY as a bearer token.

    Raises:
        KeyError: when made without VLLM_API_KEY in the environment; the server then does not start.

    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._key_digest = _digest(os.environ["VLLM_API_KEY"].encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        # A browser asks OPTIONS before the real request, and is not allowed to send the key with it.
        free = scope["type"] == "lifespan" or scope.get("method") == "OPTIONS" or scope.get("path") in OPEN_PATHS
        if free or self._allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _allowed(self, scope: Scope) -> bool:
        for name, value in scope.get("headers", []):
            if name == b"authorization":
                scheme, _, token = value.partition(b" ")
                return scheme.lower() == b"bearer" and secrets.compare_digest(_digest(token), self._key_digest)
        return False


def _digest(token: bytes) -> bytes:
    """Return a digest, so that comparing takes the same time whatever the lengths."""
    return hashlib.sha256(token).digest()
