"""How much a request asks for: tokens of an answer, answers; and the fields that nobody may set."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from step128_launcher.access import AccessLimits
from step128_launcher.middleware.asgi import Reason, RequestRefusedError

TOKEN_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
# Prompts x answers for each. vLLM would take 16384, and makes each a request of its own.
MAX_SEQUENCES = 256
# They reach past the checks here: into the image processor (how large it makes an image), the loaders of media, the
# transfer of KV caches between servers, and the chat template.
REFUSED_FIELDS = (
    "chat_template",
    "ec_transfer_params",
    "kv_transfer_params",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "prompt_embeds",
    "vllm_xargs",
)


def parse_request(body: bytes) -> dict[str, Any]:
    """Return the JSON object.

    What two parsers could read in two ways is refused: another encoding than UTF-8, a name twice in one object, NaN.

    Raises:
        RequestRefusedError: 400.

    """
    try:
        document = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _refused(f"The body is not one JSON object in UTF-8: {error}.") from error
    if not isinstance(document, dict):
        raise _refused("The body is not one JSON object.")
    return document


def check_amounts(document: dict[str, Any], limits: AccessLimits) -> None:
    """Return if the request asks for no more than it may.

    Raises:
        RequestRefusedError: 400.

    """
    for name in REFUSED_FIELDS:
        if document.get(name) is not None:
            raise _refused(f"This server does not take {name} from a request. Leave it out.")
    for name in TOKEN_FIELDS:
        asked = _whole_number(document, name)
        if limits.max_tokens is not None and asked is not None and asked > limits.max_tokens:
            raise _refused(f"{name} is {asked}; this server generates at most {limits.max_tokens} tokens a request.")
    prompt = document.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    answers = _whole_number(document, "n") or 1
    if prompts * answers > MAX_SEQUENCES:
        raise _refused(
            f"The request asks for {prompts * answers} answers (prompts times n); this server gives at most "
            f"{MAX_SEQUENCES} a request."
        )
    tools = document.get("tools")
    for tool in tools if isinstance(tools, list) else []:
        if isinstance(tool, dict) and tool.get("type", "function") != "function":
            raise _refused("This server takes only tools of type function: it runs and calls nothing itself.")


def _whole_number(document: dict[str, Any], name: str) -> int | None:
    value = document.get(name)
    if value is not None and type(value) is not int:
        raise _refused(f"{name} needs a whole number, written as one.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return document


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _refused(message: str) -> RequestRefusedError:
    return RequestRefusedError(400, Reason.REQUEST, message)
