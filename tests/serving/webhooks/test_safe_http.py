"""Addresses that clients choose: what leads into our network is refused and never contacted."""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.webhooks.safe_http import (
    AddressRefused,
    OutboundFailed,
    OutboundPolicy,
    fetch,
    resolve_url,
    send,
)

REFUSED = [
    "https://127.0.0.1/x", "https://127.1/", "https://0/", "https://0.0.0.0/", "https://localhost/",
    "https://10.0.0.1/", "https://172.16.0.1/", "https://192.168.1.1/", "https://100.64.0.1/",
    "https://169.254.169.254/latest/meta-data/", "https://224.0.0.1/", "https://255.255.255.255/",
    "https://2130706433/", "https://0x7f000001/", "https://0x7f.1/", "https://0177.0.0.1/",
    "https://017700000001/", "https://[::1]/", "https://[::]/", "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/", "https://[::ffff:169.254.169.254]/", "https://[::127.0.0.1]/",
    "https://[64:ff9b::7f00:1]/", "https://[2002:7f00:1::]/", "https://[2001:0:7f00:1::]/",
    "https://[fec0::1]/", "https://192.88.99.1/",
    "https://[fe80::1]/", "https://[fe80::1%25eth0]/", "https://[fd00::1]/", "https://[ff02::1]/",
    "https://127.0.0.1./", "http://example.com/", "ftp://example.com/", "file:///etc/passwd",
    "gopher://example.com/", "//example.com/", "https://", "https:///x", "https://user@example.com/",
    "https://user:hunter2@example.com/", "https://example.com:0/", "https://example.com:99999/",
    "https://exa mple.com/", "https://example.com\\@127.0.0.1/", "https://example.com/\nhost: x",
    "https://ex\u00e4mple.com/", "https://\u2460\u2461\u2466.0.0.1/", "https://" + "a" * 3000,
]  # fmt: skip


@pytest.mark.parametrize("url", REFUSED)
async def test_an_address_that_is_not_public_is_refused(url: str) -> None:
    with pytest.raises(AddressRefused) as caught:
        await resolve_url(url, OutboundPolicy(), "webhook.url")
    assert caught.value.param == "webhook.url"
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["10.1.2.3"], ["::1"], ["::ffff:10.0.0.1"], ["93.184.215.14", "127.0.0.1"]],
)
async def test_a_name_that_leads_inside_is_refused(addresses: list[str]) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return addresses

    with pytest.raises(AddressRefused):
        await resolve_url("https://innocent.example/hook", OutboundPolicy(resolve=resolve))


async def test_an_allowed_network_is_allowed_and_nothing_beside_it() -> None:
    policy = OutboundPolicy(allowed_networks=("10.1.0.0/16",))
    assert (await resolve_url("https://10.1.2.3/x?y=1", policy)).address == "10.1.2.3"
    assert (await resolve_url("https://[::ffff:10.1.2.3]/", policy)).port == 443
    with pytest.raises(AddressRefused):
        await resolve_url("https://10.2.2.3/", policy)


@pytest.fixture
async def server() -> AsyncIterator[Callable[[bytes], tuple[str, list[bytes]]]]:
    """Starts servers that answer with given bytes; ``(url, requests that came)``."""
    servers: list[asyncio.Server] = []

    async def start(answer: bytes, endless: bool = False) -> tuple[str, list[bytes]]:
        came: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            came.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer)
            try:
                while endless:
                    writer.write(b"x" * 65536)
                    await writer.drain()
                await writer.drain()
            except OSError:
                pass
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        servers.append(server)
        return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", came

    yield start  # type: ignore[misc]
    for server in servers:
        server.close()


LOOPBACK = OutboundPolicy(allow_http=True, allowed_networks=("127.0.0.0/8",))


async def test_the_connection_goes_to_the_address_that_was_checked(server: Callable) -> None:  # type: ignore[type-arg]
    url, came = await server(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    port = url.rpartition(":")[2]
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])  # another address at the second look

    async def resolve(host: str, port: int) -> list[str]:
        return next(answers)

    policy = OutboundPolicy(allow_http=True, allowed_networks=("127.0.0.1/32",), resolve=resolve)
    target = await resolve_url(f"http://receiver.example:{port}/hook", policy)
    answer = await send(target, "POST", {}, b"{}", seconds=5, max_bytes=99, policy=policy)
    assert (answer.status, answer.body) == (200, b"ok")
    assert b"Host: receiver.example:" in came[0]
    assert next(answers) == ["127.0.0.2"], "the name was resolved once"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(server: Callable, status: int) -> None:  # type: ignore[type-arg]
    inside, came = await server(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
    head = f"HTTP/1.1 {status} X\r\nlocation: {inside}\r\ncontent-length: 0\r\n\r\n"
    url, _ = await server(head.encode())
    with pytest.raises(InvalidRequest, match=f"answered {status}.*Redirects are not followed"):
        await fetch(url, LOOPBACK, io.BytesIO(), seconds=5, max_bytes=10, param="image_url")
    assert came == []


async def test_an_answer_that_never_ends_is_cut(server: Callable) -> None:  # type: ignore[type-arg]
    url, _ = await server(b"HTTP/1.1 200 OK\r\n\r\n", endless=True)
    with pytest.raises(InvalidRequest, match="more than 1,000,000 bytes") as caught:
        await fetch(url, LOOPBACK, io.BytesIO(), seconds=20, max_bytes=1_000_000, param="image_url")
    assert caught.value.code == "failed_to_download_image"


async def test_a_server_that_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(InvalidRequest, match=r"no complete answer within 0\.\d+ s"):
            await fetch(url, LOOPBACK, io.BytesIO(), seconds=0.3, max_bytes=10, param="image_url")


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nx" * 9])
async def test_what_is_no_answer_is_a_typed_failure(server: Callable, answer: bytes) -> None:  # type: ignore[type-arg]
    url, _ = await server(answer)
    with pytest.raises(OutboundFailed):
        target = await resolve_url(url, LOOPBACK)
        await send(target, "GET", {}, b"", seconds=2, max_bytes=10, policy=LOOPBACK)


async def test_a_name_that_nobody_knows_is_a_typed_failure() -> None:
    with pytest.raises(OutboundFailed, match="cannot be resolved"):
        await resolve_url("https://name.invalid/", OutboundPolicy())
