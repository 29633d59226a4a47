"""Requests to addresses that somebody else chose: webhooks, and pictures named by URL.

Such an address must not lead into our own network. The name is resolved here, every address that it
has is checked, and the connection goes to the checked address: a name that resolves otherwise a
moment later (DNS rebinding) changes nothing. Redirects are not followed, proxies not used.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any
from urllib.parse import urlsplit

import httpcore

from calotype.serving.core.errors import InvalidRequest

Resolve = Callable[[str, int], Awaitable[list[str]]]
MAX_URL_CHARS = 2048

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# What `is_global` lets pass but is translated to another address, or is only of one site.
_TRANSLATED = tuple(
    ipaddress.ip_network(text)
    for text in (
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2002::/16",
        "2001::/32",
        "::/96",
        "192.88.99.0/24",
        "fec0::/10",
    )
)


class AddressRefused(InvalidRequest):
    """The URL leads where requests of a client must not go; nothing was contacted."""


class OutboundFailed(Exception):
    """No answer: the connection failed, took too long or broke; the text says how."""


@dataclass(frozen=True, slots=True)
class OutboundPolicy:
    """Where requests may go."""

    allow_http: bool = False
    """Plain http, for addresses that are allow-listed."""
    allowed_networks: Sequence[str] = ()
    """Networks such as ``10.1.0.0/16`` that are allowed although they are private."""
    resolve: Resolve | None = field(default=None, repr=False)
    """Another resolver than the system's."""
    ssl_context: ssl.SSLContext | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Target:
    """A checked URL."""

    url: str
    scheme: str
    host: str
    port: int
    path: str
    address: str
    """The address that was checked, and is connected to."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


def check_url(url: str, policy: OutboundPolicy, param: str = "url") -> tuple[str, str, int, str]:
    """(scheme, host, port, path with query) of a URL that may be asked; resolves nothing.

    Raises:
        AddressRefused: it is no URL of ours, or names a refused address by its digits.
    """

    def refuse(reason: str) -> AddressRefused:
        return AddressRefused(f"{param} {reason}.", param=param)

    if not isinstance(url, str) or len(url) > MAX_URL_CHARS or not url.isascii():
        raise refuse(f"must be a URL of at most {MAX_URL_CHARS} plain characters")
    if any(ord(char) <= 32 or char in "\\\x7f" for char in url):
        raise refuse("contains a blank, a backslash or a control character")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").rstrip(".")
    except ValueError:
        raise refuse("is not a valid URL") from None
    if parts.scheme != "https" and not (parts.scheme == "http" and policy.allow_http):
        raise refuse("must begin with https://")
    if parts.username is not None or parts.password is not None:
        raise refuse("must not contain a user name or password")
    if not host or port == 0:
        raise refuse("names no host")
    literal = _literal(host)
    if literal is not None:
        _check_address(literal, policy, param)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path


async def resolve_url(url: str, policy: OutboundPolicy, param: str = "url") -> Target:
    """The URL with the address that its host has now.

    Raises:
        AddressRefused: see `check_url`; or one of its addresses is refused.
        OutboundFailed: the name cannot be resolved.
    """
    scheme, host, port, path = check_url(url, policy, param)
    literal = _literal(host)
    if literal is not None:
        return Target(url, scheme, host, port, path, str(literal))
    found = await (policy.resolve or _resolve)(host, port)
    if not found:
        raise OutboundFailed(f"the name {host} has no address")
    for text in found:
        # One refused address refuses all of them: who mixes them in has a reason.
        _check_address(ipaddress.ip_address(text), policy, param)
    return Target(url, scheme, host, port, path, found[0])


async def send(
    target: Target,
    method: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    seconds: float,
    max_bytes: int,
    policy: OutboundPolicy,
    into: IO[bytes] | None = None,
) -> Answer:
    """One request to a checked address, all of it within ``seconds``.

    Args:
        into: where the answer's body goes instead of into `Answer.body`.

    Raises:
        OutboundFailed: no connection, no answer in time, or more than ``max_bytes``.
    """
    try:
        async with asyncio.timeout(seconds):
            return await _exchange(target, method, headers, body, max_bytes, policy, into)
    except TimeoutError:
        raise OutboundFailed(f"no complete answer within {seconds:g} s") from None
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
        raise OutboundFailed(str(error)[:200] or type(error).__name__) from error
    except (OSError, ssl.SSLError) as error:
        raise OutboundFailed(str(error)[:200] or type(error).__name__) from error


async def fetch(
    url: str,
    policy: OutboundPolicy,
    into: IO[bytes],
    *,
    seconds: float,
    max_bytes: int,
    param: str,
) -> None:
    """Writes the body behind a URL into a file.

    Raises:
        AddressRefused: see `resolve_url`.
        InvalidRequest: it cannot be had (``failed_to_download_image``).
    """
    started = time.monotonic()
    try:
        target = await asyncio.wait_for(resolve_url(url, policy, param), seconds)
        left = max(0.1, seconds - (time.monotonic() - started))
        accept = {"accept": "image/png, image/jpeg, image/webp"}
        answer = await send(
            target, "GET", accept, b"", seconds=left, max_bytes=max_bytes, policy=policy, into=into
        )
    except TimeoutError:
        raise _not_had(param, f"its name was not resolved within {seconds:g} s") from None
    except OutboundFailed as error:
        raise _not_had(param, str(error)) from error
    if answer.status != 200:
        raise _not_had(param, f"the server answered {answer.status}")


def _not_had(param: str, reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param} could not be downloaded: {reason}. Redirects are not followed.",
        code="failed_to_download_image",
        param=param,
    )


async def _exchange(
    target: Target,
    method: str,
    headers: Mapping[str, str],
    body: bytes,
    max_bytes: int,
    policy: OutboundPolicy,
    into: IO[bytes] | None,
) -> Answer:
    default = 443 if target.scheme == "https" else 80
    name = f"[{target.host}]" if ":" in target.host else target.host
    host = name if target.port == default else f"{name}:{target.port}"
    # The connection goes to the checked address; certificate and Host are the name's.
    origin = httpcore.URL(
        scheme=target.scheme, host=target.address, port=target.port, target=target.path
    )
    extensions: dict[str, Any] = {"sni_hostname": target.host}
    sent = [("Host", host), *headers.items()]
    if body:
        sent.append(("Content-Length", str(len(body))))
    async with httpcore.AsyncConnectionPool(
        ssl_context=policy.ssl_context or _ssl_context(), max_connections=1
    ) as pool:
        async with pool.stream(
            method, origin, headers=sent, content=body, extensions=extensions
        ) as answer:
            found, size = bytearray(), 0
            async for chunk in answer.aiter_stream():
                size += len(chunk)
                if into is None:
                    found += chunk
                else:
                    into.write(chunk)
                if size > max_bytes:
                    raise OutboundFailed(f"the answer has more than {max_bytes:,} bytes")
            names = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in answer.headers}
            return Answer(answer.status, names, bytes(found))


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpcore.default_ssl_context()


async def _resolve(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise OutboundFailed(f"the name {host} cannot be resolved") from error
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


def _literal(host: str) -> Address | None:
    """The address that a host writes as digits, in any of the ways that resolvers understand."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        # 2130706433, 0x7f000001, 0177.1, 127.1: what inet_aton reads is an IPv4 address.
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def _check_address(address: Address, policy: OutboundPolicy, param: str) -> None:
    plain = address
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        plain = address.ipv4_mapped
    for text in policy.allowed_networks:
        network = ipaddress.ip_network(text)
        if plain.version == network.version and plain in network:
            return
    translated = any(
        plain.version == network.version and plain in network for network in _TRANSLATED
    )
    if not plain.is_global or plain.is_multicast or plain.is_reserved or translated:
        raise AddressRefused(
            f"{param} leads to an address that is not public, which this service does not contact.",
            param=param,
        )
