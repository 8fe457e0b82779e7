"""Whether a host of an image lies on the public internet: asked before vLLM fetches from it.

What remains: vLLM resolves the name again when it fetches. Who controls the DNS of a host that was allowed can answer
differently the second time. Only a network without a way to private addresses excludes that.
"""

from __future__ import annotations

import asyncio
import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from step128_launcher.middleware.asgi import Reason, RequestRefusedError

# RFC 6052: the last 32 bits are an IPv4 address that a gateway translates to.
_NAT64 = IPv6Network("64:ff9b::/96")
# All that has been given out for the public internet.
_GLOBAL_UNICAST = IPv6Network("2000::/3")


async def check_host(host: str) -> None:
    """Return if every address of the host is public.

    Raises:
        RequestRefusedError: 400.

    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RequestRefusedError(400, Reason.MEDIA, f"The host {host} of an image cannot be resolved.") from error
    if not found or not all(is_public(str(address[0])) for *_, address in found):
        raise RequestRefusedError(400, Reason.MEDIA, f"The host {host} of an image is not on the public internet.")


def is_public(text: str) -> bool:
    """Return whether an address, as the resolver gives it, belongs to the public internet.

    Private, loopback, link-local, multicast and reserved ones do not, nor IPv6 addresses that stand for an IPv4 one,
    but for those of a NAT64 gateway, which are judged by the IPv4 address in them.
    """
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return is_public(str(IPv4Address(int(address) & 0xFFFFFFFF)))
        if address not in _GLOBAL_UNICAST or address.sixtofour:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)
