"""The routes of an application, as it answers them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def routes_of(routes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Method and path of each, also of those that other routers and applications bring."""
    for route in routes:
        inside = getattr(route, "original_router", route)
        if inside is not route or not hasattr(route, "methods"):
            yield from routes_of(inside.routes)
            continue
        for method in route.methods - {"HEAD"}:
            yield method, route.path
