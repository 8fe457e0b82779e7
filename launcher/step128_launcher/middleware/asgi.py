"""The types of ASGI, and the one exception by which a request is refused."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from enum import StrEnum
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Reason(StrEnum):
    """Why a request was refused: the label `reason` of step128_requests_refused_total."""

    NOT_SERVED = "not_served"
    NO_KEY = "no_key"
    WRONG_KEY = "wrong_key"
    METHOD = "method"
    BODY_SIZE = "body_size"
    BODY_SLOW = "body_slow"
    REQUEST = "request"
    MEDIA = "media"


class RequestRefusedError(Exception):
    """A request that vLLM does not get to see; `message` is for its sender, and is logged nowhere."""

    def __init__(
        self, status: int, reason: Reason, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.headers = headers


class ClientGoneError(Exception):
    """The client closed the connection before it had sent its request."""
