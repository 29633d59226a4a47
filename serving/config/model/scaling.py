"""How many replicas run, and when there are more or fewer of them."""

from __future__ import annotations

from pydantic import Field

from calotype.serving.config.base import ProfileName, Rule, Spec


class Replicas(Spec):
    """Bounds of the autoscaler; equal numbers switch it off."""

    rules = (
        Rule(
            lambda s: s.min <= s.max,
            "self.min <= self.max",
            "replicas.min must not exceed replicas.max: lower min or raise max",
        ),
    )

    min: int = Field(1, ge=0, le=1000, description="Replicas that always run; 0 = may sleep.")
    max: int = Field(1, ge=1, le=1000, description="Replicas at most.")


class Autoscaling(Spec):
    """When replicas are added and taken away."""

    target_queue_seconds: float = Field(
        20,
        gt=0,
        le=86_400,
        description="Replicas are added until the predicted wait, in seconds, is shorter.",
    )
    upscale_delay_seconds: float = Field(
        10, ge=0, le=86_400, description="How long a need must last, in seconds; 0 = act at once."
    )
    downscale_delay_seconds: float = Field(
        900, ge=0, le=86_400, description="How long a replica may idle, in seconds."
    )
    scale_to_zero_after_seconds: float | None = Field(
        None,
        ge=0,
        le=604_800,
        description="How long the last replica may idle, in seconds, where replicas.min is 0. "
        "Default: downscaleDelaySeconds.",
    )


class TextEncoder(Spec):
    """The text encoder where it has GPUs of its own."""

    resource_profile: ProfileName | None = Field(
        None,
        description="Profile of the chart's resourceProfiles for one replica. Default: the "
        "profile of the model.",
    )
    replicas: Replicas = Field(default_factory=Replicas, description="Text encoder replicas.")
