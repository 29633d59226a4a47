"""What has happened to a job, as numbered events.

Nothing is kept for them: the events up to now, and their numbers, follow from the job's row. So a
stream can be resumed at any gateway, and after any restart, with the number of the last event that
a client saw. Numbers grow; within one lease by denoise step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from calotype.serving.jobs.records import JobRecord, PreviewRecord

Kind = Literal["queued", "started", "progress", "partial_image", "succeeded", "failed", "canceled"]

EventType = Literal[
    "image.job.started",
    "image.job.succeeded",
    "image.job.failed",
    "image.job.canceled",
    "image.asset.released",
]
"""What webhooks tell of."""
EVENT_TYPES: Final[tuple[EventType, ...]] = get_args(EventType)
TERMINAL_EVENTS: Final = tuple(name for name in EVENT_TYPES if name != "image.job.started")
"""What a job's own webhook tells of by default."""
RELEASED_EVENT: Final = "image.asset.released"
TEST_EVENT: Final = "webhook.test"

_PER_FENCE = 1_000_000
_PER_STEP = 100
_LAST_STEP = 9_900
_TERMINAL = _PER_FENCE - 1
MAX_EVENT_ID = 10**15


@dataclass(frozen=True, slots=True)
class JobEvent:
    id: int
    kind: Kind
    preview: PreviewRecord | None = None
    """Of a ``partial_image``."""

    @property
    def terminal(self) -> bool:
        return self.kind in ("succeeded", "failed", "canceled")


def events_since(
    job: JobRecord, previews: Sequence[PreviewRecord], last_id: int | None
) -> list[JobEvent]:
    """The events after number ``last_id``, oldest first; None = from the beginning."""
    after = -1 if last_id is None else last_id
    return [event for event in _history(job, previews) if event.id > after]


def _history(job: JobRecord, previews: Sequence[PreviewRecord]) -> Iterator[JobEvent]:
    yield JobEvent(0, "queued")
    base = job.fence * _PER_FENCE
    if job.status == "queued" and job.fence:
        yield JobEvent(base, "queued")  # its generator died or was drained
    if job.started is not None:
        # Of the lease that drew it: fences are odd while a job is leased.
        leased = base if job.fence % 2 else base - _PER_FENCE
        if job.status != "queued":
            yield JobEvent(leased + 1, "started")
    if job.status in ("running", "succeeded"):
        marks: list[tuple[int, PreviewRecord | None]] = [
            (
                _mark(base, preview.step, 1 + preview.partial_index * 10 + preview.image_index),
                preview,
            )
            for preview in previews
            if preview.fence == job.fence
        ]
        if job.step and job.status == "running":
            marks.append((_mark(base, job.step, 0), None))
        for number, preview in sorted(marks, key=lambda mark: mark[0]):
            yield JobEvent(number, "progress" if preview is None else "partial_image", preview)
    if job.status in ("succeeded", "failed", "canceled"):
        yield JobEvent(base + _TERMINAL, job.status)


def _mark(base: int, step: int, slot: int) -> int:
    return base + 2 + min(step, _LAST_STEP) * _PER_STEP + min(slot, _PER_STEP - 1)


def parse_event_id(text: str | None) -> int | None:
    """The number in a ``Last-Event-ID``; None when there is none or it is none of ours."""
    if text is None or not (text.isascii() and text.isdigit()) or len(text) > 15:
        return None
    return int(text)
