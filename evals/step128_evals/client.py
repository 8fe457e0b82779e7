"""One OpenAI-compatible endpoint, asynchronous; every failure becomes a sentence with an exit code."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
import openai

from step128_evals.address import check_address, is_loopback
from step128_evals.errors import (
    BusyError,
    ConfigurationError,
    EvalError,
    NoSuchRouteError,
    ServerUnreachableError,
    UnauthorizedError,
)

_TIMEOUT_SECONDS = 3600.0  # a prompt of 200k tokens takes minutes on a GPU, and more on a CPU


# Inside a stream, openai lets its transport's own errors through: httpx's up to release 2, httpx2's since 3.
_CONNECTION_ERRORS: tuple[type[Exception], ...] = (
    openai.APIConnectionError,
    *(importlib.import_module(name).HTTPError for name in ("httpx", "httpx2") if importlib.util.find_spec(name)),
)


@dataclass(frozen=True)
class ModelInfo:
    """What ``/v1/models`` says. ``max_context_tokens`` is vLLM's ``max_model_len``, ``root`` the folder or repository
    that it was loaded from; None if the server hides them."""

    name: str
    max_context_tokens: int | None
    root: str | None = None


class Client:
    """Use as an async context manager. ``openai`` is the official client; the methods are what it lacks.

    Args:
        base_url: the server's address, with or without ``/v1``.
        api_key: sent as a bearer token; None for a server without one.
        timeout_seconds: between two pieces of an answer, so for the whole of one that is not streamed.

    A server on this machine is never asked through a proxy: the key would leave the machine.

    Raises:
        ConfigurationError: the address or the key cannot be used, or the environment names an unusable proxy.
    """

    def __init__(self, base_url: str, api_key: str | None, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self.root_url = base_url.rstrip("/").removesuffix("/v1")
        host = check_address(self.root_url)
        if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
            raise ConfigurationError("the API key is empty or not one line of printable ASCII characters")
        # A connection a request: llama.cpp's server ends one after a stream without saying so, and the request that
        # finds it dead would look like a server that is.
        closing = {"Connection": "close"}
        headers = closing | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        trust_env = not is_loopback(host)
        try:
            self._http = httpx.AsyncClient(
                base_url=self.root_url, headers=headers, timeout=timeout_seconds, trust_env=trust_env
            )
            transport = openai.DefaultAsyncHttpxClient(headers=closing, trust_env=trust_env, timeout=timeout_seconds)
        except (ValueError, ImportError) as error:
            raise ConfigurationError(f"a proxy that the environment names cannot be used: {error}") from error
        # No retries: an eval must see a failure, not hide it.
        self.openai = openai.AsyncOpenAI(
            base_url=f"{self.root_url}/v1",
            api_key=api_key or "none",
            max_retries=0,
            timeout=timeout_seconds,
            http_client=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()
        await self.openai.close()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn the exceptions of both HTTP libraries into :class:`EvalError`.

        Raises:
            ServerUnreachableError: no connection, or it broke, or no answer in time.
            UnauthorizedError: status 401 or 403.
            NoSuchRouteError, BusyError: status 404 or 405; status 429, 502, 503 or 504.
            EvalError: any other status, or an answer that is not what the API promises.
        """
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise self._status_error(error.response.status_code, _reason(error.response)) from error
        except openai.APIStatusError as error:
            raise self._status_error(error.status_code, _reason(error.response)) from error
        except _CONNECTION_ERRORS as error:
            cause = error.__cause__ or error
            raise ServerUnreachableError(
                f"no answer from {self.root_url} ({type(cause).__name__}: {cause}). "
                "Is the server running, and is this its address? `step128 serve` starts one."
            ) from error
        except openai.APIError as error:
            raise EvalError(f"{self.root_url} broke off with an error: {error.message}") from error
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise EvalError(f"{self.root_url} sent an answer that does not follow the API: {error!r}") from error

    def _status_error(self, status: int, reason: str) -> EvalError:
        if status in (401, 403):
            return UnauthorizedError(
                f"{self.root_url} refuses the API key (status {status}). "
                "Pass the server's key with --api-key-file FILE, or in VLLM_API_KEY."
            )
        kinds = {404: NoSuchRouteError, 405: NoSuchRouteError} | dict.fromkeys((429, 502, 503, 504), BusyError)
        error = kinds.get(status, EvalError)(f"{self.root_url} answered with status {status}: {reason}")
        error.status = status
        return error

    async def get_text(self, path: str) -> str:
        """GET a text document, for instance ``/metrics``."""
        with self.explained():
            response = await self._http.get(path)
            response.raise_for_status()
            return response.text

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST JSON, return the JSON object that comes back."""
        with self.explained():
            response = await self._http.post(path, json=body)
            response.raise_for_status()
            answer = response.json()
            if not isinstance(answer, dict):
                raise TypeError(f"a JSON object was expected, not {type(answer).__name__}")
            return answer

    async def model(self, name: str | None = None) -> ModelInfo:
        """The served model of that name, or the first one.

        Raises:
            EvalError: the server does not serve it.
        """
        with self.explained():
            models: list[dict[str, Any]] = json.loads(await self.get_text("/v1/models"))["data"]
            for entry in models:
                if name in (None, entry["id"]):
                    return ModelInfo(entry["id"], entry.get("max_model_len"), entry.get("root"))
        served = ", ".join(entry["id"] for entry in models) or "nothing"
        raise EvalError(f"{self.root_url} does not serve {name or 'any model'}; it serves {served}")

    async def tokenize(self, model: str, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text, by the server's own tokenizer (vLLM's ``/tokenize``)."""
        body = {"model": model, "prompt": text, "add_special_tokens": add_special_tokens}
        with self.explained():
            return [int(token) for token in (await self.post("/tokenize", body))["tokens"]]


def _reason(response: Any) -> str:
    """The server's own words, from the places where OpenAI-like servers put them (a response of either library)."""
    try:
        document = response.json()
        error = document.get("error", document)
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, AttributeError, KeyError):
        return str(response.reason_phrase)
