"""The routes that are served. Any other path of vLLM's, and any that a later release adds, is 404 before vLLM sees it.

tests/stack/vllm_routes.py lists every route of vLLM 0.32 with the decision, and a test fails on one without.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from step128_launcher.middleware.asgi import Reason, RequestRefusedError, Scope


class Access(Enum):
    """Who may ask: anyone, holders of the metrics token or the API key, holders of the API key."""

    OPEN = "open"
    METRICS = "metrics"
    API = "api"


@dataclass(frozen=True)
class Route:
    """One method of one path."""

    method: str
    access: Access


ROUTES = {
    "/health": Route("GET", Access.OPEN),
    "/metrics": Route("GET", Access.METRICS),
    "/v1/models": Route("GET", Access.API),
    "/v1/chat/completions": Route("POST", Access.API),
    "/v1/completions": Route("POST", Access.API),
    # Without a store (VLLM_ENABLE_RESPONSES_API_STORE): an answer cannot be asked for again, nor cancelled by its id.
    "/v1/responses": Route("POST", Access.API),
    # They generate nothing; step128-eval cuts texts by the server's own tokenizer.
    "/tokenize": Route("POST", Access.API),
    "/detokenize": Route("POST", Access.API),
}


def find_route(scope: Scope) -> Route:
    """Return the route of a request; a path must be spelled exactly, with nothing percent-encoded in it.

    vLLM mounts /metrics for every path that starts so, and FastAPI redirects a path with a slash too many: neither is
    found here.

    Raises:
        RequestRefusedError: 404.

    """
    path: str = scope["path"]
    route = ROUTES.get(path)
    if route is None or scope.get("raw_path", path.encode()) != path.encode() or scope.get("root_path"):
        raise RequestRefusedError(
            404, Reason.NOT_SERVED, f"This server does not serve this path. It serves {', '.join(ROUTES)}."
        )
    return route
