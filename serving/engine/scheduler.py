"""Which rows are denoised next. Plain Python: no torch, no numpy, no clock.

A *row* is one picture in the making. Rows of one bucket (same latent shape, same token layout) may
share a denoise step, each at its own timestep, with its own guidance and adapters. The engine asks
for a `StepBatch`, runs it, and reports it with `completed`.

The order is "least work left first, with patience": among requests of the highest priority, the row
that has the least work left, less the work that others were given while it waited, goes first. A
short request that arrives behind long ones is drawn at once; a long one waits for at most about its
own length of others' work; and requests of one length run in the order of arrival, so that the
first is not slowed by the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Bucket:
    """Shape key: rows may share a step when their buckets are equal.

    Attributes:
        rows: rows of image tokens.
        columns: columns of image tokens.
        text_tokens: text tokens, padding included.
        references: rows and columns of image tokens of each reference picture.
    """

    rows: int
    columns: int
    text_tokens: int
    references: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that one pass puts through the denoiser: the unit of work."""
        seen = sum(rows * columns for rows, columns in self.references)
        return self.rows * self.columns + self.text_tokens + seen


@dataclass(frozen=True, slots=True)
class StepRow:
    """One row of a step: picture ``index`` of a request, at denoiser evaluation ``step``."""

    request_id: str
    index: int
    step: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What to denoise next; never empty."""

    bucket: Bucket
    rows: tuple[StepRow, ...]


@dataclass(slots=True)
class _Entry:
    """A request's place in the schedule; ``done`` counts evaluations of each row."""

    request_id: str
    bucket: Bucket
    priority: int
    evaluations: int
    passes: int
    arrival: int
    done: list[int]
    waited: float = 0.0
    """Work, in token evaluations, that others were given since it was last served."""
    admitted: bool = field(default=False)

    @property
    def open_rows(self) -> list[int]:
        return [i for i, done in enumerate(self.done) if done < self.evaluations]

    @property
    def work_left(self) -> int:
        left = sum(self.evaluations - done for done in self.done)
        return left * self.passes * self.bucket.tokens

    @property
    def key(self) -> tuple[int, float, int]:
        return (-self.priority, self.work_left - self.waited, self.arrival)


class StepScheduler:
    """Waiting and running requests, and the choice of the next batch.

    Args:
        max_batch_rows: rows that share one step.
        max_running_rows: pictures whose latents are kept in memory at once; more requests wait.
            A request larger than that runs alone.
        bucket_rows: rows for single buckets where they differ from ``max_batch_rows``.
    """

    def __init__(
        self,
        max_batch_rows: int = 8,
        max_running_rows: int = 64,
        bucket_rows: Mapping[Bucket, int] | None = None,
    ) -> None:
        if max_batch_rows < 1 or max_running_rows < 1:
            raise ValueError("max_batch_rows and max_running_rows must be at least 1")
        self._max_batch_rows = max_batch_rows
        self._max_running_rows = max_running_rows
        self._bucket_rows = dict(bucket_rows or {})
        self._entries: dict[str, _Entry] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def add(
        self,
        request_id: str,
        bucket: Bucket,
        *,
        rows: int,
        evaluations: int,
        passes: int = 1,
        priority: int = 0,
    ) -> None:
        """Queues a request.

        Args:
            rows: pictures.
            evaluations: denoiser calls of each picture.
            passes: denoiser passes of each call; two with a negative prompt.
        """
        if request_id in self._entries:
            raise ValueError(f"request {request_id!r} is already scheduled")
        if rows < 1 or evaluations < 1:
            raise ValueError("rows and evaluations must be at least 1")
        self._arrivals += 1
        self._entries[request_id] = _Entry(
            request_id, bucket, priority, evaluations, passes, self._arrivals, [0] * rows
        )

    def remove(self, request_id: str) -> None:
        """Forgets a request; unknown ones are no error."""
        self._entries.pop(request_id, None)

    def limit_rows(self, bucket: Bucket, rows: int) -> None:
        """Lowers the rows of a bucket's steps, after the device ran out of memory."""
        self._bucket_rows[bucket] = max(1, rows)

    def row_limit(self, bucket: Bucket) -> int:
        """Passes that share a step of this bucket."""
        return self._bucket_rows.get(bucket, self._max_batch_rows)

    @property
    def running_rows(self) -> int:
        return sum(len(e.open_rows) for e in self._entries.values() if e.admitted)

    def next_batch(self) -> StepBatch | None:
        """The next rows to denoise; None when nothing is left to do."""
        self._admit()
        ready = sorted(
            (e for e in self._entries.values() if e.admitted and e.open_rows), key=lambda e: e.key
        )
        if not ready:
            return None
        bucket = ready[0].bucket
        limit = self.row_limit(bucket)
        rows: list[StepRow] = []
        for entry in ready:
            for index in entry.open_rows if entry.bucket == bucket else ():
                if rows and limit < entry.passes:
                    return StepBatch(bucket, tuple(rows))
                rows.append(StepRow(entry.request_id, index, entry.done[index]))
                limit -= entry.passes
        return StepBatch(bucket, tuple(rows))

    def completed(self, batch: StepBatch) -> None:
        """Counts a batch that was run; rows of removed requests are ignored."""
        served = {row.request_id for row in batch.rows}
        work = batch.bucket.tokens * sum(
            self._entries[row.request_id].passes
            for row in batch.rows
            if row.request_id in self._entries
        )
        for entry in self._entries.values():
            entry.waited = 0.0 if entry.request_id in served else entry.waited + work
        for row in batch.rows:
            entry_of_row = self._entries.get(row.request_id)
            if entry_of_row is not None:
                entry_of_row.done[row.index] += 1

    def _admit(self) -> None:
        running = self.running_rows
        waiting = sorted((e for e in self._entries.values() if not e.admitted), key=lambda e: e.key)
        for entry in waiting:
            rows = len(entry.done)
            if running and running + rows > self._max_running_rows:
                # Smaller requests behind it must not keep a large one waiting for ever.
                break
            entry.admitted = True
            running += rows
