"""Lists as OpenAI's clients page through them: ``limit`` and ``after``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calotype.serving.core.errors import InvalidRequest

MAX_PAGE = 100


def page_size(limit: str, most: int = MAX_PAGE) -> int:
    """Raises InvalidRequest when it is no number from 1 to ``most``."""
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:6]) <= most):
        raise InvalidRequest(f"limit must be 1 to {most}.", param="limit")
    return int(limit)


def list_object(items: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": list(items),
        "has_more": has_more,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
    }
