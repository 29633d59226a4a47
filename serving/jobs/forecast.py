"""When the jobs of a model will be over, as its dispatcher estimates it.

The dispatcher writes a forecast to the database about once a second, so that any gateway can tell
a client where its job stands without asking another process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.payloads import known_fields
from calotype.serving.jobs.predictor import Work, WorkPredictor
from calotype.serving.jobs.throughput import Throughput

PROMISE_MARGIN = 1.25
"""A promise is the estimate and a quarter more: how exact estimates are meant to be."""
PROMISE_SLACK = 2.0
"""Seconds on top, so that short jobs do not break promises by a hiccup."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Figures of one model at one moment; the column ``figures`` of its row."""

    model: str
    updated: float = 0.0
    queued: int = 0
    backlog_seconds: float = 0.0
    """Seconds until everything that is known now is drawn."""
    throughput: float = 1.0
    """Seconds that pass for one predicted device second of the backlog."""
    overhead_seconds: float = 0.0
    """Seconds of a job that are not device time: checking, encoding, storing."""
    predictor: JsonObject = field(default_factory=dict)
    """`WorkPredictor.to_payload`."""
    ends: dict[str, float] = field(default_factory=dict)
    """Open job -> seconds from ``updated`` until it is over."""
    positions: dict[str, int] = field(default_factory=dict)
    """Queued job -> how many are taken before it."""

    @property
    def measured(self) -> bool:
        """Whether the figures rest on jobs that were drawn, not on a guess."""
        return bool(self.predictor.get("measured"))

    def device_seconds(self, work: Work) -> float:
        """Predicted device time of a request."""
        return WorkPredictor.from_payload(self.predictor).predict(work)

    def new_job_seconds(self, work: Work) -> float:
        """Until a job that arrives now is over."""
        own = self.device_seconds(work) * self.throughput + self.overhead_seconds
        return self.backlog_seconds + own

    def seconds_left(self, job_id: str, now: float) -> float | None:
        """Until an open job is over; None when the dispatcher has not seen it yet."""
        end = self.ends.get(job_id)
        return None if end is None else max(0.0, self.updated + end - now)

    def to_payload(self) -> JsonObject:
        return asdict(self)

    @classmethod
    def from_payload(cls, model: str, payload: JsonObject) -> Forecast:
        """A dispatcher of another release may have written it: unknown fields are ignored."""
        return cls(**known_fields(cls, payload) | {"model": model})


def promise(estimate: float) -> float:
    """Seconds within which a job is promised to be over."""
    return estimate * PROMISE_MARGIN + PROMISE_SLACK


def make_forecast(
    model: str,
    now: float,
    running: Sequence[tuple[str, float]],
    waiting: Sequence[tuple[str, float]],
    predictor: WorkPredictor,
    throughput: Throughput,
    together: int = 1,
) -> Forecast:
    """The forecast for jobs that run and wait, each with the device seconds that it still needs.

    Jobs that run share their device, so that each of them ends about when half of what the
    others need is done as well; a waiting one when all before it and half of its later
    neighbours are.

    Args:
        running: in any order.
        waiting: in the order in which they will be taken.
        together: how many jobs run at once.
    """
    speed, overhead = throughput.seconds_per_device_second, throughput.overhead_seconds
    ends: dict[str, float] = {}
    positions: dict[str, int] = {}
    in_hand = sum(seconds for _, seconds in running)
    for job_id, seconds in running:
        ends[job_id] = round((seconds + (in_hand - seconds) / 2) * speed + overhead / 2, 3)
    neighbours = together - 1
    done = in_hand
    for place, (job_id, seconds) in enumerate(waiting):
        done += seconds
        later = sum(more for _, more in waiting[place + 1 : place + 1 + neighbours])
        ends[job_id] = round((done + later / 2) * speed + overhead, 3)
        positions[job_id] = place
    return Forecast(
        model=model,
        updated=now,
        queued=len(waiting),
        backlog_seconds=round(done * speed, 3),
        throughput=speed,
        overhead_seconds=overhead,
        predictor=predictor.to_payload(),
        ends=ends,
        positions=positions,
    )
