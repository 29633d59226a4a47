"""Clients of the simulated service: they call its routes, wait, hang up and try again.

A request runs in a gateway's process, where it dies with it; the client is outside, never dies, and
notes everything that it was told and shown.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from simulation.loop import answer
from simulation.parts.pictures import shown_in
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from calotype.serving.api.http.failures import error_response
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import CalotypeError
from calotype.serving.jobs.records import KeyRecord

if TYPE_CHECKING:
    from simulation.world import World

Route = Callable[..., Awaitable[Any]]


class Lost(Exception):
    """The connection broke before the answer was whole."""


@dataclass
class Answer:
    """What a client got."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def again(self) -> bool:
        """Whether a client sends the request again."""
        return self.status in (429, 500, 502, 503)


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture that reached a client."""

    digest: str
    time: float
    """When the request began."""
    where: str


class Client:
    """One connection after the other, of one API key."""

    def __init__(self, world: World, key: KeyRecord) -> None:
        self.world, self.key = world, key
        self.shown: list[Shown] = []

    async def call(
        self,
        route: Route,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        keyed: bool = True,
        hangup: float | None = None,
        on_part: Callable[[str], None] | None = None,
        **parameters: str,
    ) -> Answer:
        """One request.

        Args:
            route: the production function that answers it.
            keyed: it takes the caller's key.
            hangup: seconds after which the client closes its connection.
            on_part: called with each part of a stream.

        Raises:
            Lost: the gateway died, or the client hung up.
        """
        world, loop = self.world, self.world.loop
        living = [found for found in world.gateways.values() if found[0].alive]
        if not living:
            await asyncio.sleep(0.5)
            raise Lost
        process, gateway = living[int(world.rng.random() * len(living))]
        done: asyncio.Future[Answer] = loop.create_future()
        gone, started, began = asyncio.Event(), [200], loop.time()
        headers_of: dict[str, str] = {}
        arriving: list[Any] = []
        received: list[bytes] = []
        where = f"{path} at {began:.2f} s"

        def hear() -> None:
            message = arriving.pop(0)  # in the order in which they were sent
            if message["type"] == "http.response.start":
                started[0] = message["status"]
                headers_of.update({k.decode(): v.decode() for k, v in message["headers"]})
                return
            part = message.get("body", b"")
            received.append(part)
            self._look(part, began, where)
            if on_part is not None:
                on_part(part.decode())
            if not message.get("more_body"):
                answer(done, Answer(started[0], b"".join(received), headers_of), None)

        async def send(message: Any) -> None:
            if gone.is_set():
                raise OSError("the client hung up")
            arriving.append(message)
            loop.call_soon(hear, context=loop.nobody)

        request = _request(gateway, path, body, headers or {}, gone)
        if keyed:
            parameters["key"] = self.key  # type: ignore[assignment]
        process.calls.add(done)
        loop.spawn(process, _answered(route, request, parameters, send))
        try:
            async with asyncio.timeout(hangup):
                return await done
        except TimeoutError:
            gone.set()
            world.note(f"the client of {where} hangs up")
            raise Lost from None
        except Exception as error:
            raise Lost from error
        finally:
            process.calls.discard(done)

    def _look(self, part: bytes, began: float, where: str) -> None:
        for digest in _pictures(part):
            self.shown.append(Shown(digest, began, where))


def _pictures(part: bytes) -> list[str]:
    """Also those that JSON carries as base64."""
    found = shown_in(part)
    for piece in part.split(b'"'):
        if piece.startswith(b"PHBpY3R1cmUg"):  # "<picture "
            found += shown_in(base64.b64decode(piece))
    return found


def _request(
    gateway: Gateway,
    path: str,
    body: Mapping[str, Any] | None,
    headers: Mapping[str, str],
    gone: asyncio.Event,
) -> Request:
    data = b"" if body is None else json.dumps(body).encode()
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": data, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    sent_headers = {"content-type": "application/json", "host": "pictures.test", **headers}
    where, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": "POST" if body is not None else "GET",
        "path": where,
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in sent_headers.items()],
        "scheme": "https",
        "server": ("pictures.test", 443),
        "state": {"request_id": "req_simulated"},
        "app": SimpleNamespace(state=SimpleNamespace(gateway=gateway)),
    }
    return Request(scope, receive)


async def _answered(
    route: Route, request: Request, parameters: Mapping[str, Any], send: Any
) -> None:
    try:
        found = await route(request, **parameters)
        if not isinstance(found, Response):
            found = JSONResponse(found)
    except CalotypeError as error:
        found = error_response(error)
    except Exception as error:  # a bug: the production middleware answers so, too
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send(
            {"type": "http.response.body", "body": json.dumps({"bug": repr(error)}).encode()}
        )
        return
    try:
        await found(request.scope, request.receive, send)
    except OSError:
        return  # nobody reads any more
