"""Team: who may draw, how much, and with which models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from calotype.serving.config.base import (
    LABEL,
    NAME_RULE,
    PolicyRef,
    Resource,
    Spec,
    StatusModel,
    Transition,
    Unique,
    name_rule,
)
from calotype.serving.config.conditions import Failure, Status, Time

LONGEST_NAME = 50
ADMINISTRATORS = "default"
"""The team of the service's own API key; no Team of a cluster is given its name."""


class Quotas(Spec):
    """What a team may use; a missing one is no limit."""

    requests_per_minute: int | None = Field(
        None, ge=1, le=1_000_000, description="Requests in a minute. Default: no limit."
    )
    concurrent_jobs: int | None = Field(
        None, ge=1, le=100_000, description="Jobs that wait or run. Default: no limit."
    )
    gpu_seconds_per_day: float | None = Field(
        None, gt=0, le=1e9, description="GPU seconds in a day of UTC. Default: no limit."
    )
    budget_per_month: float | None = Field(
        None,
        gt=0,
        le=1e12,
        description="Money in a calendar month of UTC, in the chart's currency. Default: no limit.",
    )


class Keys(Spec):
    """The team's API key, which the operator makes and keeps in a Secret."""

    transitions = (
        Transition(
            "self.rotate >= oldSelf.rotate",
            "keys.rotate only counts up: raise it by one to have a new key made",
            ".rotate",
        ),
    )

    rotate: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Raise it by one to have a new key made; the old one ends at once.",
    )


class TeamSpec(Spec):
    """Who may draw, how much, and with which models."""

    display_name: str | None = Field(
        None, min_length=1, max_length=200, description="Name for people. Default: the Team's name."
    )
    weight: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="Share of the GPUs while teams compete: 2 gets twice as much as 1.",
    )
    quotas: Quotas = Field(default_factory=Quotas, description="What the team may use.")
    models: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=63), NAME_RULE]], Unique()
    ] = Field(
        default_factory=list,
        max_length=128,
        description="Names of the ImageModels that it may use. Default: every one.",
    )
    moderation_policy_ref: PolicyRef | None = Field(
        None,
        description="ModerationPolicy of this namespace for the team's requests; stricter than "
        "the model's, never laxer. Default: the model's.",
    )
    keys: Keys = Field(default_factory=Keys, description="The team's API key.")


class KeySecret(StatusModel):
    """The Secret with the team's API key."""

    name: str = Field(max_length=253, description="Name of the Secret, in this namespace.")
    key: str = Field("api-key", max_length=253, description="Key inside the Secret.")


class MonthlyUsage(StatusModel):
    """What a team has used in the current month of UTC."""

    month: str | None = Field(None, max_length=7, description="The month, for example 2026-11.")
    requests: int | None = Field(None, ge=0, description="Requests.")
    images: int | None = Field(None, ge=0, description="Pictures.")
    gpu_seconds: float | None = Field(None, ge=0, description="GPU seconds.")
    cost: float | None = Field(None, ge=0, description="Money, in the chart's currency.")
    updated_time: Time | None = Field(None, description="When it was counted, in UTC.")


class TeamStatus(Status):
    """What the operator knows about a team."""

    phase: Literal["Pending", "Ready", "Failed"] | None = Field(
        None, description="Where the team is in its life, in one word."
    )
    key_secret_ref: KeySecret | None = Field(None, description="Where the API key is.")
    key_prefix: str | None = Field(
        None, max_length=64, description="The first characters of the API key, to tell keys apart."
    )
    rotation: str | None = Field(
        None, max_length=32, description="The keys.rotate that the present key was made for."
    )
    usage: MonthlyUsage | None = Field(None, description="What it has used this month.")
    last_failure: Failure | None = Field(None, description="What went wrong last.")


class Team(Resource):
    """Who may draw, how much, and with which models."""

    rules = (name_rule(LONGEST_NAME, "the Secret calotype-key-NAME and labels hold it", LABEL),)

    kind: Literal["Team"] = "Team"
    spec: TeamSpec = Field(default_factory=TeamSpec)
