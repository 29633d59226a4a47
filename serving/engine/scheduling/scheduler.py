"""Which rows are denoised next. Plain Python: no torch, no numpy, no clock.

A *row* is one image in the making. Rows of one bucket (same latent shape, same token layout) may
share a denoise step, each at its own timestep, with its own guidance and adapters. The engine asks
for a `StepBatch`, runs it, and reports it with `completed`. Everything is decided anew before each
step, so that a request is pre-empted between two steps and at no other time.

The order: the highest priority; among its tenants the one that was given least work by its weight
(`fair_share`); among the tenant's requests those that would miss their deadline if they waited, and
then "least work left first, with patience": the one with the least work left, less the work that
others were given while it waited. A short request that arrives behind long ones is drawn at once;
a long one waits for at most about its own length of others' work; and requests of one length run
in the order of arrival, so that the first is not slowed by the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from calotype.serving.engine.scheduling.fair_share import FairShare

_HASTE = 0.5
"""A request is urgent when waiting for this share of its own remaining time would make it late."""

_PACE_MEMORY = 0.8
"""Share of the old value when a new measurement of the pace comes in."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Shape key: rows may share a step when their buckets are equal.

    Attributes:
        rows: rows of image tokens.
        columns: columns of image tokens.
        text_tokens: text tokens, padding included.
        references: rows and columns of image tokens of each reference image.
        times: time positions of the references where some are left out; empty = 10, 20, ...
    """

    rows: int
    columns: int
    text_tokens: int
    references: tuple[tuple[int, int], ...] = ()
    times: tuple[int, ...] = ()

    def seeing(self, places: Sequence[int]) -> Bucket:
        """The same with some of the references, which keep their time positions."""
        if len(places) == len(self.references):
            return self
        kept = tuple(self.references[place] for place in places)
        return replace(self, references=kept, times=tuple(10 + 10 * place for place in places))

    @property
    def reference_tokens(self) -> int:
        return sum(rows * columns for rows, columns in self.references)

    @property
    def tokens(self) -> int:
        """Tokens that one pass puts through the denoiser: the unit of work."""
        return self.rows * self.columns + self.text_tokens + self.reference_tokens


@dataclass(frozen=True, slots=True)
class StepRow:
    """One row of a step: image ``index`` of a request, at denoiser evaluation ``step``."""

    request_id: str
    index: int
    step: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What to denoise next; never empty."""

    bucket: Bucket
    rows: tuple[StepRow, ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """What the device has room for besides the model.

    Attributes:
        total: bytes for the images in the making and for one step.
        token: bytes that a token takes while it goes through the denoiser.
    """

    total: float
    token: float

    def step(self, bucket: Bucket) -> float:
        """Bytes of one pass."""
        return bucket.tokens * self.token


@dataclass(slots=True)
class _Entry:
    """A request's place in the schedule; ``done`` counts evaluations of each row."""

    request_id: str
    bucket: Bucket
    evaluations: int
    passes: int
    priority: int
    tenant: str
    deadline: float | None
    row_bytes: float
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
    def bytes(self) -> float:
        return len(self.done) * self.row_bytes

    def spare(self, now: float, throughput: float) -> float:
        """Seconds that it could wait and still be in time."""
        if self.deadline is None:
            return float("inf")
        return self.deadline - now - self.work_left * throughput


class StepScheduler:
    """Waiting and running requests, and the choice of the next batch.

    Args:
        max_batch_rows: denoiser passes that share one step.
        max_running_rows: images whose latents are kept in memory at once; more requests wait.
            A request larger than that runs alone.
        bucket_rows: passes for single buckets where they differ from ``max_batch_rows``.
        memory: what there is room for; None is no limit.
        profile: how many passes of a bucket are worth it; ``max_batch_rows`` holds all the same.
    """

    def __init__(
        self,
        max_batch_rows: int = 8,
        max_running_rows: int = 64,
        bucket_rows: Mapping[Bucket, int] | None = None,
        memory: Memory | None = None,
        profile: Callable[[Bucket], int] | None = None,
    ) -> None:
        if max_batch_rows < 1 or max_running_rows < 1:
            raise ValueError("max_batch_rows and max_running_rows must be at least 1")
        self._max_batch_rows = max_batch_rows
        self._max_running_rows = max_running_rows
        self._bucket_rows = dict(bucket_rows or {})
        self._memory = memory
        self._profile = profile
        self._entries: dict[str, _Entry] = {}
        self._tenants = FairShare()
        self._arrivals = 0
        self._pace = 0.0
        """Seconds of one unit of work; 0 until a step was measured."""

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
        tenant: str = "",
        weight: float = 1.0,
        deadline: float | None = None,
        row_bytes: float = 0.0,
        done: Sequence[int] | None = None,
    ) -> None:
        """Queues a request.

        Args:
            rows: images.
            evaluations: denoiser calls of each image.
            passes: denoiser passes of each call; two with a negative prompt.
            tenant: whose it is, and ``weight`` its share against other tenants.
            deadline: when it must be finished, on the clock of `next_batch`.
            row_bytes: what an image in the making takes of the memory.
            done: evaluations that each image has behind it already; None is none.
        """
        if request_id in self._entries:
            raise ValueError(f"request {request_id!r} is already scheduled")
        if rows < 1 or evaluations < 1:
            raise ValueError("rows and evaluations must be at least 1")
        self._tenants.enter(tenant, weight)
        self._arrivals += 1
        self._entries[request_id] = _Entry(
            request_id,
            bucket,
            evaluations,
            passes,
            priority,
            tenant,
            deadline,
            row_bytes,
            self._arrivals,
            [0] * rows if done is None else list(done),
        )

    def remove(self, request_id: str) -> None:
        """Forgets a request; unknown ones are no error."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self._tenants.leave(entry.tenant)

    def fits(self, bucket: Bucket, rows: int, row_bytes: float) -> bool:
        """Whether a request could run if it were alone."""
        if self._memory is None:
            return True
        return self._memory.step(bucket) + rows * row_bytes <= self._memory.total

    def limit_rows(self, bucket: Bucket, rows: int) -> None:
        """Lowers the passes of a bucket's steps, after the device ran out of memory."""
        self._bucket_rows[bucket] = max(1, rows)

    def row_limit(self, bucket: Bucket) -> int:
        """Passes that share a step of this bucket."""
        limit = self._bucket_rows.get(bucket)
        if limit is None:
            limit = self._max_batch_rows
            if self._profile is not None:
                limit = max(1, min(limit, self._profile(bucket)))
            self._bucket_rows[bucket] = limit
        if self._memory is not None:
            held = sum(e.bytes for e in self._entries.values() if e.admitted)
            room = (self._memory.total - held) // self._memory.step(bucket)
            limit = max(1, min(limit, int(room)))
        return limit

    def measured(self, batch: StepBatch, seconds: float) -> None:
        """Tells how long a batch took; deadlines are reckoned by it.

        The pace is that of a full step, which a request alone may not reach: who is given up by
        it could not have been in time.
        """
        throughput = seconds / max(1, self._work(batch))
        keep = _PACE_MEMORY if self._pace else 0.0
        self._pace = keep * self._pace + (1 - keep) * throughput

    def hopeless(self, now: float) -> list[str]:
        """Requests that would miss their deadline even if nobody else was served."""
        return [
            e.request_id
            for e in self._entries.values()
            if e.deadline is not None and e.spare(now, self._pace) < 0
        ]

    @property
    def running_rows(self) -> int:
        return sum(len(e.open_rows) for e in self._entries.values() if e.admitted)

    def next_batch(self, now: float = 0.0) -> StepBatch | None:
        """The next rows to denoise; None when nothing is left to do.

        Args:
            now: seconds on any clock that does not go back; deadlines are told on the same.
        """
        self._admit(now)
        ready = sorted(
            (e for e in self._entries.values() if e.admitted and e.open_rows),
            key=lambda entry: self._order(entry, now),
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
        work = self._work(batch)
        for entry in self._entries.values():
            entry.waited = 0.0 if entry.request_id in served else entry.waited + work
        for row in batch.rows:
            entry_of_row = self._entries.get(row.request_id)
            if entry_of_row is not None:
                entry_of_row.done[row.index] += 1
                share = entry_of_row.passes * batch.bucket.tokens
                self._tenants.charge(entry_of_row.tenant, share)

    def _work(self, batch: StepBatch) -> int:
        passes = (self._entries[r.request_id].passes for r in batch.rows if r.request_id in self)
        return batch.bucket.tokens * sum(passes)

    def _order(self, entry: _Entry, now: float) -> tuple[float, float, float, float, int]:
        spare = entry.spare(now, self._pace)
        urgent = spare < _HASTE * entry.work_left * self._pace
        return (
            -entry.priority,
            self._tenants.used(entry.tenant),
            spare if urgent else float("inf"),
            entry.work_left - entry.waited,
            entry.arrival,
        )

    def _admit(self, now: float) -> None:
        waiting = [e for e in self._entries.values() if not e.admitted]
        if not waiting:
            return
        rows = self.running_rows
        held = sum(e.bytes for e in self._entries.values() if e.admitted)
        waiting.sort(key=lambda entry: self._order(entry, now))
        for entry in waiting:
            rows += len(entry.done)
            held += entry.bytes
            crowded = rows > self._max_running_rows
            if self._memory is not None:
                crowded |= held + self._memory.step(entry.bucket) > self._memory.total
            if crowded and rows > len(entry.done):
                # Smaller requests behind it must not keep a large one waiting for ever.
                break
            entry.admitted = True
