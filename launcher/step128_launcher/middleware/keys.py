"""The API key and the metrics token: compared by digest, in the same time whatever was sent."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Mapping

from step128_launcher.access import METRICS_TOKEN_VARIABLE
from step128_launcher.middleware.asgi import Reason, RequestRefusedError, Scope
from step128_launcher.middleware.routes import Access

_LOG_EVERY_SECONDS = 60.0
# Below vLLM's logger, whose handler it shares.
_logger = logging.getLogger("vllm.step128")


class Keys:
    """Knows which bearer token opens what: the API key everything, the metrics token (if there is one) /metrics only.

    Raises:
        KeyError: when made without VLLM_API_KEY in the environment; the server then does not start.
        ValueError: the API key is empty.

    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        key = environment["VLLM_API_KEY"]
        if not key:
            raise ValueError("VLLM_API_KEY is empty")
        token = environment.get(METRICS_TOKEN_VARIABLE)
        self._digests = {Access.API: [_digest(key.encode())], Access.METRICS: [_digest(key.encode())]}
        if token:
            self._digests[Access.METRICS].append(_digest(token.encode()))
        self._wrong_since_log = 0
        self._logged_at = -_LOG_EVERY_SECONDS

    def check(self, access: Access, scope: Scope) -> None:
        """Return if the request may ask for this.

        Raises:
            RequestRefusedError: 401.

        """
        if access is Access.OPEN:
            return
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        if not sent:
            raise _unauthorized(Reason.NO_KEY, "This path needs the API key: Authorization: Bearer KEY.")
        scheme, _, token = sent[0].partition(b" ")
        digest = _digest(token)
        # Every one is compared, also after a match.
        matches = [hmac.compare_digest(digest, known) for known in self._digests[access]]
        if len(sent) > 1 or scheme.lower() != b"bearer" or not any(matches):
            self._count_wrong()
            raise _unauthorized(Reason.WRONG_KEY, "The key in the Authorization header is not one for this path.")

    def _count_wrong(self) -> None:
        """Say it in the log, at most once a minute: someone may be guessing, and must not fill the disk by it."""
        self._wrong_since_log += 1
        now = time.monotonic()
        if now - self._logged_at >= _LOG_EVERY_SECONDS:
            _logger.warning("step128: requests with a wrong key: %d.", self._wrong_since_log)
            self._logged_at, self._wrong_since_log = now, 0


def _unauthorized(reason: Reason, message: str) -> RequestRefusedError:
    return RequestRefusedError(401, reason, message, ((b"www-authenticate", b"Bearer"),))


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
