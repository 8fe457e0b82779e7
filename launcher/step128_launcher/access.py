"""What a request to the server may cost, as the launcher tells it to the middleware in vLLM's process.

Both sides import this file, so it needs nothing but the standard library.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

ACCESS_VARIABLE = "STEP128_ACCESS"
METRICS_TOKEN_VARIABLE = "STEP128_METRICS_TOKEN"


@dataclass(frozen=True)
class AccessLimits:
    """Bounds of one request; `max_tokens` None is the context of the plan, known only when there is one.

    The body's holds the largest image the processor does not make smaller (3024 x 3024 pixels, 3 bytes each) in base64,
    however badly it compresses. `media_domains` are the hosts that images may be fetched from; none: from nowhere.
    """

    max_body_bytes: int = 64 << 20
    max_tokens: int | None = None
    max_images: int = 16
    max_image_bytes: int = 32 << 20
    max_image_pixels: int = 50_000_000
    media_domains: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return one line for ACCESS_VARIABLE."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> AccessLimits:
        """Return what `to_json` wrote.

        Raises:
            ValueError, TypeError: the text is something else.

        """
        document: dict[str, Any] = json.loads(text)
        return cls(**(document | {"media_domains": tuple(document["media_domains"])}))
