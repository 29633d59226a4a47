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


def allowed(*scopes: str, counted: bool = False) -> Callable[[Request], Awaitable[KeyRecord]]:
    """A FastAPI dependency: the caller's key, which must have one of ``scopes``.

    Args:
        counted: the request is one of the team's `requests_per_minute`. Where a job is made, the
            transaction that makes it counts it.

    Raises (the dependency):
        Unauthenticated: no valid key.
        PermissionDenied: the key has other scopes.
        QuotaExceeded: the team asks too often.
    """

    async def check(request: Request) -> KeyRecord:
        gateway, given = gateway_of(request), bearer(request)
        try:
            key = await asyncio.to_thread(gateway.database.api_keys.authenticate, given)
        except Unauthenticated:
            if not await gateway.refresh():
                raise
            key = await asyncio.to_thread(gateway.database.api_keys.authenticate, given)
        if not {*scopes, "admin"} & set(key.scopes):
            wanted = " or ".join(f"'{scope}'" for scope in scopes)
            raise PermissionDenied(
                f"This API key may not do this: it lacks the scope {wanted} "
                f"(it has: {', '.join(key.scopes) or 'none'})."
            )
        gateway.rates.take(key.team_id)
        if counted:
            rate = await asyncio.to_thread(gateway.database.teams.take_request, key.team_id)
            request.state.rates = [] if rate is None else [rate]
        return key

    return check
