"""How long checking a text may take: as long as its length explains."""

from __future__ import annotations

CHARS_IN_TIME = 4_000
"""A policy's ``timeoutSeconds`` is for a text of so many characters; a longer one has more."""


def text_seconds(seconds: float, chars: int) -> float:
    """The time for a text, where ``seconds`` is that for a short one."""
    return seconds * max(1.0, chars / CHARS_IN_TIME)
