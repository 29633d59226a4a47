"""Who is asking: ``Authorization: Bearer ct_live_...``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.requests import Request

from calotype.serving.api.state.gateway import gateway_of
from calotype.serving.core.errors import PermissionDenied, Unauthenticated
from calotype.serving.jobs.records import KeyRecord


def bearer(request: Request) -> str:
    """The key that the request carries.

    Raises:
        Unauthenticated: none, or not as a bearer token.
    """
    given = request.headers.getlist("authorization")
    kind, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    if kind.lower() != "bearer" or not key.strip():
        raise Unauthenticated(
            "You didn't provide an API key. Send it as 'Authorization: Bearer ct_live_...'."
        )
    return key.strip()


def allowed(scope: str) -> Callable[[Request], Awaitable[KeyRecord]]:
    """A FastAPI dependency: the caller's key, which must have ``scope``."""

    async def check(request: Request) -> KeyRecord:
        gateway, given = gateway_of(request), bearer(request)
        try:
            key = await asyncio.to_thread(gateway.database.api_keys.authenticate, given)
        except Unauthenticated:
            if not await gateway.refresh():
                raise
            key = await asyncio.to_thread(gateway.database.api_keys.authenticate, given)
        if scope not in key.scopes and "admin" not in key.scopes:
            raise PermissionDenied(
                f"This API key may not do this: it lacks the scope '{scope}' "
                f"(it has: {', '.join(key.scopes) or 'none'})."
            )
        return key

    return check
