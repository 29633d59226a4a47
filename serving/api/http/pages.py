"""Lists as OpenAI's clients page through them: ``limit`` and ``after``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Literal, TypeVar

from typing_extensions import TypedDict

from calotype.serving.core.errors import InvalidRequest

MAX_PAGE = 100


def page_size(limit: str, most: int = MAX_PAGE) -> int:
    """Raises InvalidRequest when it is no number from 1 to ``most``."""
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:6]) <= most):
        raise InvalidRequest(f"limit must be 1 to {most}.", param="limit")
    return int(limit)


class Listed(TypedDict):
    """What lists hold."""

    id: str


class Deleted(TypedDict):
    """The answer to a deletion."""

    id: str
    object: str
    deleted: Literal[True]


T = TypeVar("T", bound=Listed)


class Page(TypedDict, Generic[T]):
    """Some objects of a list."""

    object: Literal["list"]
    data: list[T]
    has_more: bool
    first_id: str | None
    last_id: str | None


def list_object(items: Sequence[T], has_more: bool) -> Page[T]:
    return {
        "object": "list",
        "data": list(items),
        "has_more": has_more,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
    }
