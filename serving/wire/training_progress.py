"""What a training tells on its way: a stream of events, and where it is now.

A run appends each event as a line of JSON to ``events.jsonl`` in its folder, numbered from 1;
command, API and operator read the same lines. A resumed run goes on with the numbers; steps that
it runs again are told again. `TrainingProgress` is the answer of ``GET /internal/v1/training`` on
the head of a training's Ray cluster, made of these events. Fields that this version does not know
are kept and have no effect; an answer of a higher version is refused (`wire.document`).
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, ValidationError

from calotype.serving.wire.document import Document, JsonObject, Part

EVENTS_FILE = "events.jsonl"

EventType = Literal[
    "dataset_checked",
    "cache_written",
    "started",
    "resumed",
    "step",
    "checkpoint_saved",
    "checkpoint_corrupt",
    "checkpoint_failed",
    "sample_drawn",
    "sample_failed",
    "suspended",
    "succeeded",
    "failed",
]


class TrainingEvent(Part):
    """One line of the stream. Fields that do not belong to a type are absent."""

    sequence: int = Field(ge=1, description="Counts from 1.")
    time: float = Field(description="Seconds since 1970, UTC.")
    type: EventType
    step: int = Field(0, ge=0, description="Steps that are done.")
    total_steps: int = Field(0, ge=0)
    loss: float | None = Field(None, description="Mean of the last steps.")
    learning_rate: float | None = None
    seconds_per_step: float | None = None
    eta_seconds: float | None = Field(None, description="Predicted time until the end.")
    cost: float | None = Field(None, description="Device time so far, in USD.")
    cost_left: float | None = Field(None, description="Predicted, in USD.")
    file: str | None = Field(None, description="Checkpoint, sample or result, in the run's folder.")
    prompt: str | None = Field(None, description="Of a sample.")
    message: str | None = Field(None, description="For people.")
    error: JsonObject | None = Field(None, description="code, message and param of a failure.")


def read_events(folder: pathlib.Path, after: int = 0) -> Iterator[TrainingEvent]:
    """The events of a run with a higher number; none where it has not begun.

    A last line that is being written is left for the next reading.
    """
    try:
        with (folder / EVENTS_FILE).open(encoding="utf-8") as lines:
            for line in lines:
                if not line.endswith("\n"):
                    return
                try:
                    event = TrainingEvent.model_validate_json(line)
                except ValidationError:
                    continue  # cut off by a kill
                if event.sequence > after:
                    yield event
    except FileNotFoundError:
        return


class TrainingProgress(Document):
    """How far a training is."""

    step: int | None = Field(None, ge=0, description="Steps that are done.")
    loss: float | None = None
    eta_seconds: float | None = Field(None, ge=0, description="Predicted time until the end.")
    samples: list[JsonObject] | None = Field(None, description="Sample images, newest last.")
