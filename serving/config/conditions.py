"""The parts that the status of every kind has: conditions and the last failure."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from calotype.serving.config.base import StatusModel

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"}, max_length=40)]
"""RFC 3339 with seconds, in UTC: 2026-11-23T09:00:00Z."""


class Condition(StatusModel):
    """metav1.Condition, field by field."""

    type: str = Field(
        min_length=1, max_length=316, description="What the condition is about, for example Ready."
    )
    status: Literal["True", "False", "Unknown"] = Field(
        description="Whether it holds; Unknown while the operator does not know yet."
    )
    observed_generation: int | None = Field(
        None, ge=0, description="The metadata.generation that the condition was set for."
    )
    last_transition_time: Time = Field(description="When status changed last, in UTC.")
    reason: str = Field(
        min_length=1, max_length=1024, description="One word in CamelCase for programs."
    )
    message: str = Field(max_length=32768, description="A sentence for people.")


Conditions = Annotated[
    list[Condition],
    Field(
        default_factory=list,
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        description="What is known about the object, one entry for each type.",
    ),
]


class Failure(StatusModel):
    """The last thing that went wrong; kept after it was healed."""

    time: Time | None = Field(None, description="When, in UTC.")
    reason: str | None = Field(None, max_length=1024, description="One word in CamelCase.")
    message: str | None = Field(
        None, max_length=32768, description="A sentence that says what is wrong and what to do."
    )


class Retried(Failure):
    """A failure that is tried again."""

    attempts: int | None = Field(None, ge=0, description="How often it was tried.")
    next_retry_time: Time | None = Field(
        None, description="When it is tried again, in UTC. Absent: only after a change."
    )
    fingerprint: str | None = Field(
        None,
        max_length=64,
        description="Digest of what was tried; something else is tried at once.",
    )


class Status(StatusModel):
    """What every kind reports."""

    observed_generation: int | None = Field(
        None, ge=0, description="The metadata.generation that this status describes."
    )
    conditions: Conditions
