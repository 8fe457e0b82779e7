"""The body of a request: read whole within its limits, and handed on as it came."""

from __future__ import annotations

import asyncio

from step128_launcher.middleware.asgi import ClientGoneError, Message, Reason, Receive, RequestRefusedError, Scope

# 64 MiB in this time are 4.5 Mbit/s. Only holders of the key come as far as here.
BODY_SECONDS = 120.0


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """Return the body.

    Raises:
        RequestRefusedError: 413, if it is longer than `max_bytes`, declared or counted; 408, if it takes too long.
        ClientGoneError: the client went away.

    """
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > max_bytes:
            raise _too_large(max_bytes)
    chunks: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    raise ClientGoneError
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                chunks.append(chunk)
                more = message.get("more_body", False)
    except TimeoutError as error:
        raise RequestRefusedError(
            408,
            Reason.BODY_SLOW,
            f"The request did not arrive within {BODY_SECONDS:.0f} s.",
            ((b"connection", b"close"),),
        ) from error
    return b"".join(chunks)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body first, then what comes after it (the client's going away)."""
    sent = False

    async def receive_again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def _too_large(max_bytes: int) -> RequestRefusedError:
    return RequestRefusedError(
        413, Reason.BODY_SIZE, f"The request is larger than the {max_bytes} bytes this server takes (--max-body-size)."
    )
