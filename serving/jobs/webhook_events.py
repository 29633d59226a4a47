"""The events that webhooks tell of."""

from __future__ import annotations

from typing import Final, Literal, get_args

EventType = Literal[
    "image.job.started",
    "image.job.succeeded",
    "image.job.failed",
    "image.job.canceled",
    "image.asset.released",
]
EVENT_TYPES: Final[tuple[EventType, ...]] = get_args(EventType)
TERMINAL_EVENTS: Final = tuple(name for name in EVENT_TYPES if name != "image.job.started")
"""What a job's own webhook tells of by default."""
RELEASED_EVENT: Final = "image.asset.released"
TEST_EVENT: Final = "webhook.test"
