"""What can go wrong with an endpoint, each with the exit code that the command line ends with."""

from __future__ import annotations


class EvalError(Exception):
    """The endpoint answered, but not as it should; ``status`` is the HTTP status of a refusal."""

    exit_code = 70
    status: int | None = None


class ServerUnreachableError(EvalError):
    """Nothing answers at the address, or the server died while answering."""

    exit_code = 69


class UnauthorizedError(EvalError):
    """The server refuses the API key."""

    exit_code = 5


class PermissionDeniedError(EvalError):
    """A local file may not be read."""

    exit_code = 5


class UnsupportedError(EvalError):
    """The server does not have what an eval needs."""

    exit_code = 4


class NoSuchRouteError(UnsupportedError):
    """Status 404 or 405: to a probe that the server lacks a route; in the middle of a run that something is amiss, as
    when a router has unloaded the model."""


class ThresholdError(EvalError):
    """``gate``: a figure misses its threshold."""

    exit_code = 3


class CannotWriteError(EvalError):
    """A result or report cannot be written."""

    exit_code = 73


class BusyError(EvalError):
    """Status 429, 502, 503 or 504: the server, or what stands before it, cannot now. It says nothing of what it can."""


class ConfigurationError(EvalError):
    """The address or the API key cannot be used."""

    exit_code = 78


class InputNotFoundError(EvalError):
    """A local file does not exist."""

    exit_code = 66


class BadInputError(EvalError):
    """A local file exists but cannot be used."""

    exit_code = 65
