"""The few HTTP requests the supervisor makes to the server it started."""

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

_TIMEOUT_SECONDS = 10.0
_HEALTH_TIMEOUT_SECONDS = 5.0


class ServerClient:
    """Talks to one server with its API key, never through a proxy: it is on this machine."""

    def __init__(self, base_url: str, api_key: str) -> None:
        self._base_url = base_url
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def healthy(self) -> bool:
        """Return whether /health answers 200; a server that is not there yet is just not healthy."""
        try:
            self._get("/health", _HEALTH_TIMEOUT_SECONDS)
        except (OSError, http.client.HTTPException):
            return False
        return True

    def metrics(self) -> str:
        """Return /metrics as text. Raises OSError (urllib's errors are its subclasses)."""
        return self._get("/metrics").decode("utf-8")

    def model(self) -> dict[str, Any]:
        """Return the first entry of /v1/models.

        Raises:
            OSError: the request failed.
            ValueError: the answer is not what the API promises.

        """
        document = json.loads(self._get("/v1/models"))
        try:
            entry = document["data"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError("/v1/models lists no model") from error
        return dict(entry)

    def _get(self, path: str, timeout_seconds: float = _TIMEOUT_SECONDS) -> bytes:
        request = urllib.request.Request(self._base_url + path, headers=self._headers)
        with self._opener.open(request, timeout=timeout_seconds) as response:
            body: bytes = response.read()
        return body
