"""Probes and hooks of a container: by command, by HTTP, by a connection."""

import asyncio
import contextlib
import ssl
from asyncio.subprocess import DEVNULL
from collections.abc import Callable
from typing import Protocol

import aiohttp
from controlplane.client.objects import Object

KINDS = ("startupProbe", "livenessProbe", "readinessProbe")


class Target(Protocol):
    """The running container that is asked."""

    spec: Object
    env: dict[str, str]
    pid: int | None
    user: tuple[int, int]
    started: bool

    @property
    def address(self) -> str: ...


async def act(target: Target, action: Object, seconds: float) -> bool:
    """Does what a probe or a hook says once; False when it fails or takes too long."""
    try:
        async with asyncio.timeout(seconds):
            if command := action.get("exec"):
                return await _execute(target, command["command"])
            if request := action.get("httpGet"):
                return await _request(target, request)
            if socket := action.get("tcpSocket"):
                port = _port(target, socket["port"])
                _, writer = await asyncio.open_connection(
                    socket.get("host") or target.address, port
                )
                writer.close()
                return True
            if pause := action.get("sleep"):
                await asyncio.sleep(pause["seconds"])
            return True
    except (OSError, TimeoutError, aiohttp.ClientError):
        return False


async def repeat(target: Target, kind: str, became: Callable[[str, bool], None]) -> None:
    """Runs one probe; `became(kind, well)` is called when a threshold is reached for the first
    time since the other one was."""
    probe = target.spec[kind]
    await asyncio.sleep(probe.get("initialDelaySeconds", 0))
    while kind != "startupProbe" and not target.started:
        await asyncio.sleep(0.05)
    thresholds = {True: probe.get("successThreshold", 1), False: probe.get("failureThreshold", 3)}
    last, count, told = None, 0, None
    while True:
        well = await act(target, probe, probe.get("timeoutSeconds", 1))
        count = count + 1 if well is last else 1
        last = well
        if count >= thresholds[well] and told is not well:
            told = well
            became(kind, well)
            if kind == "startupProbe":
                return
        await asyncio.sleep(probe.get("periodSeconds", 10))


async def _execute(target: Target, command: list[str]) -> bool:
    if target.pid is None:
        return False
    process = await asyncio.create_subprocess_exec(
        *("nsenter", "-t", str(target.pid), "-n", "-u", "-i", "-m", "-p", "-r", "-w"),
        *("-S", str(target.user[0]), "-G", str(target.user[1]), "--", *command),
        env=target.env,
        stdin=DEVNULL,
        stdout=DEVNULL,
        stderr=DEVNULL,
    )
    try:
        return await process.wait() == 0
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


async def _request(target: Target, request: Object) -> bool:
    scheme, host = request.get("scheme", "HTTP").lower(), request.get("host") or target.address
    port = _port(target, request["port"])
    url = f"{scheme}://{host}:{port}/{request.get('path', '/').lstrip('/')}"
    headers = {header["name"]: header["value"] for header in request.get("httpHeaders", [])}
    # The kubelet checks no certificate either.
    insecure = ssl.create_default_context()
    insecure.check_hostname, insecure.verify_mode = False, ssl.CERT_NONE
    async with aiohttp.ClientSession() as session:
        async with session.get(url, ssl=insecure, headers=headers, allow_redirects=False) as answer:
            return 200 <= answer.status < 400


def _port(target: Target, port: int | str) -> int:
    if isinstance(port, int):
        return port
    for one in target.spec.get("ports", []):
        if one.get("name") == port:
            return int(one["containerPort"])
    raise OSError(f"container {target.spec['name']} has no port named {port!r}")
