"""Images in a request: how many, how large, from where. All other media are refused, in whatever field they come.

vLLM 0.32 (renderers/chat_utils.py) finds media by the part's `type`, but with a `uuid` in the part, or without a type,
by the name of any field: {"type": "text", "uuid": "", "image_url": "http://..."} is fetched. So every object in the
request is looked at, and a field that may carry media is allowed only in a part that is an image and nothing else.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from step128_launcher.access import AccessLimits
from step128_launcher.middleware.asgi import Reason, RequestRefusedError

IMAGE_TYPES = frozenset({"image_url", "input_image"})
# Content parts of the chat and responses APIs that carry or name other media, by type and by field.
REFUSED_TYPES = frozenset(
    {
        *("audio_embeds", "audio_url", "computer_call_output", "computer_screenshot", "file", "image_embeds"),
        *("image_file", "image_pil", "input_audio", "input_file", "prompt_embeds", "video_embeds", "video_url"),
    }
)
REFUSED_KEYS = frozenset(
    {
        *("audio_embeds", "audio_url", "file_data", "file_id", "file_url", "image_embeds", "image_pil", "input_audio"),
        *("prompt_embeds", "video_embeds", "video_url"),
    }
)
_IMAGE_KEYS = frozenset({"type", "image_url", "detail"})
_URL_KEYS = frozenset({"url", "detail"})
# JSON schemas, where any name may stand for a property; vLLM looks for no media in them.
_SCHEMA_FIELDS = frozenset({"response_format", "structured_outputs", "text", "tool_choice", "tools"})

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
# Narrower than a URL may be, so that no two parsers can disagree about its host.
_REMOTE_URL = re.compile(r"https?://([a-z0-9.-]+)(?::80|:443)?(?:[/?][!-\[\]-~]*)?", re.IGNORECASE)
_SIGNATURE_BYTES = 12
_SHOWN_CHARACTERS = 16


def find_images(document: dict[str, Any]) -> list[str]:
    """Return the URLs of all images of a request.

    Raises:
        RequestRefusedError: 400, if it holds other media, or an image in an unusual way.

    """
    urls: list[str] = []
    pending: list[Any] = [value for name, value in document.items() if name not in _SCHEMA_FIELDS]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if (url := _image_url(value)) is None:
                pending += value.values()
            else:
                urls.append(url)
        elif isinstance(value, list):
            pending += [item for item in value if type(item) in (dict, list)]  # as json makes them
    return urls


def check_images(urls: list[str], limits: AccessLimits) -> set[str]:
    """Return the hosts that vLLM would fetch images from; each is one of `limits.media_domains`.

    Raises:
        RequestRefusedError: 400 or 413.

    """
    if len(urls) > limits.max_images:
        most = f"at most {limits.max_images} a request" if limits.max_images else "none, it serves text only"
        raise _refused(f"The request holds {len(urls)} images; this server takes {most}.")
    hosts: set[str] = set()
    for url in urls:
        if url[:5].lower() == "data:":  # vLLM's own test
            _check_data(url, limits)
        else:
            hosts.add(_check_remote(url, limits))
    return hosts


def _image_url(part: dict[str, Any]) -> str | None:
    kind = part.get("type")
    kind = kind if isinstance(kind, str) else None
    # OpenAI's own client writes the file_id that an image does not have as null.
    names = {name for name, value in part.items() if value is not None or name != "file_id"}
    if kind in REFUSED_TYPES or not REFUSED_KEYS.isdisjoint(names):
        raise _refused("This server takes text and images only: no audio, video, files or embeddings.")
    if kind not in IMAGE_TYPES and "image_url" not in part:
        return None
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) and image.keys() <= _URL_KEYS else image
    if kind not in IMAGE_TYPES or not names <= _IMAGE_KEYS or not isinstance(url, str):
        raise _refused(
            'An image is a part like {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}} with '
            "no other fields than detail."
        )
    return url


def _check_data(url: str, limits: AccessLimits) -> None:
    head = _DATA_URL.match(url)
    if head is None:
        raise _refused("An image inside a request must start with data:image/TYPE;base64, and its data follow.")
    size = (len(url) - head.end()) * 3 // 4
    if size > limits.max_image_bytes:
        message = f"An image has {size} bytes; this server takes {limits.max_image_bytes} (--max-image-size)."
        raise RequestRefusedError(413, Reason.MEDIA, message)
    try:
        start = base64.b64decode(url[head.end() : head.end() + _SIGNATURE_BYTES * 4 // 3], validate=True)
    except (binascii.Error, ValueError):
        start = b""
    # vLLM opens 37 formats, most of them rare and little tested.
    if not start.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")) and not (
        start.startswith(b"RIFF") and start[8:12] == b"WEBP"
    ):
        raise _refused("An image is none of PNG, JPEG, WebP and GIF in base64.")


def _check_remote(url: str, limits: AccessLimits) -> str:
    if not limits.media_domains:
        raise _refused(
            "This server fetches no images. Send them inside the request (data:image/png;base64,...); who runs the "
            "server can allow hosts with --allow-media-domains."
        )
    found = _REMOTE_URL.fullmatch(url)
    if found is None or (host := found[1].lower()) not in limits.media_domains:
        raise _refused(
            f"The image {url[:_SHOWN_CHARACTERS]!r}... is none of http:// or https:// from "
            f"{', '.join(limits.media_domains)} on the usual port."
        )
    return host


def _refused(message: str) -> RequestRefusedError:
    return RequestRefusedError(400, Reason.MEDIA, message)
