"""The server's address: is it one, and does it lie on this machine?"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from step128_evals.errors import ConfigurationError


def check_address(url: str) -> str:
    """Return the host of an ``http`` or ``https`` URL.

    Raises:
        ConfigurationError: it is no such URL: no host, a port above 65535, ...
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        host.encode("idna")
        usable = parts.scheme in ("http", "https") and host and parts.port != 0 and url.isprintable() and " " not in url
        problem = "" if usable else "http://HOST:PORT is needed"
    except ValueError as error:  # also a host name that no DNS can hold
        problem = str(error)
    if problem:
        raise ConfigurationError(f"the base URL {url!r} cannot be used: {problem}")
    return host


def is_loopback(host: str) -> bool:
    """Whether a host, by its name or number, is this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
