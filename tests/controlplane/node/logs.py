"""What `kubectl logs` reads: the API server asks the node for a container's log over HTTPS."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

PORT = 10250
POLL_SECONDS = 0.1
# namespace, pod, container, whether the run before is meant -> the log, and whether it still grows
Find = Callable[[str, str, str, bool], tuple[Path, Callable[[], bool]] | None]


async def serve(address: str, certificate: Path, key: Path, find: Find) -> web.AppRunner:
    """Listens on the port of a kubelet."""
    application = web.Application()
    application.router.add_get("/containerLogs/{namespace}/{pod}/{container}", _handler(find))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, address, PORT, ssl_context=tls).start()
    return runner


def _handler(find: Find) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        match, query = request.match_info, request.query
        container, previous = match["container"], query.get("previous") == "true"
        found = find(match["namespace"], match["pod"], container, previous)
        if found is None:
            return web.Response(status=404, text=f"container {container} has no log here\n")
        log, grows = found
        response = web.StreamResponse(headers={"content-type": "text/plain"})
        await response.prepare(request)
        with log.open("rb") as file:
            text = file.read()
            if tail := query.get("tailLines"):
                count = int(tail)
                text = b"".join(text.splitlines(keepends=True)[-count:]) if count else b""
            await response.write(text)
            while query.get("follow") == "true":
                growing = grows()  # asked before the last read, so that no line is lost
                if text := file.read():
                    await response.write(text)
                elif not growing:
                    break
                await asyncio.sleep(POLL_SECONDS)
        await response.write_eof()
        return response

    return answer
