"""spec.acceptance: what a new revision must show before it serves."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from calotype.serving.config.base import Spec, StatusModel, Unique
from calotype.serving.config.conditions import Time

TRIGGER = "{trigger}"
"""Stands in an acceptance prompt for the word that evokes the adapter."""

GateName = Literal["subject", "prompt", "originality", "safety", "classPrompts"]

AcceptancePrompt = Annotated[str, Field(min_length=1, max_length=1000)]


class Thresholds(Spec):
    """What the lower bound of each gate's score must reach.

    A score is a mean over pictures; its lower bound is the one-sided 95 % bound of a bootstrap.
    """

    subject: float = Field(
        0.6,
        ge=0,
        le=1,
        description="How surely what is drawn for the trigger word shows the subject of the "
        "training pictures, from 0 to 1.",
    )
    prompt: float = Field(
        0.6, ge=0, le=1, description="How well the rest of such a prompt is obeyed, from 0 to 1."
    )
    originality: float = Field(
        0.6,
        ge=0,
        le=1,
        description="Share of those pictures that are no copies of training pictures.",
    )
    safety: float = Field(
        0.85, ge=0, le=1, description="Share of all pictures that the safety stage lets pass."
    )
    class_prompts: float = Field(
        -0.15,
        ge=-1,
        le=0,
        description="By how much prompts without the trigger word may be obeyed less than by the "
        "model without the adapter, same seeds; -0.15 = by 15 points.",
    )

    def of(self, gate: GateName) -> float:
        return {
            "subject": self.subject,
            "prompt": self.prompt,
            "originality": self.originality,
            "safety": self.safety,
            "classPrompts": self.class_prompts,
        }[gate]


class Acceptance(Spec):
    """The acceptance set of a revision, and what follows when it passes."""

    on_pass: Literal["promote", "stage", "none"] = Field(
        "promote",
        description="promote: it serves. stage: it waits, loaded nowhere, until somebody promotes "
        "it. none: its report is kept, and it serves no more than one that did not pass.",
    )
    prompts: Annotated[list[AcceptancePrompt], Unique()] = Field(
        default_factory=list,
        max_length=200,
        description="Prompts with {trigger} for the word that evokes an adapter. Default: the "
        "set of the package.",
    )
    class_prompts: Annotated[list[AcceptancePrompt], Unique()] = Field(
        default_factory=list,
        max_length=200,
        description="Prompts that must be drawn as before. Default: the set of the package.",
    )
    pictures: int = Field(
        24, ge=8, le=200, description="Pictures of each of the two kinds of prompt."
    )
    seed: int = Field(1, ge=0, le=2**53, description="Picture i is drawn with seed + i.")
    thresholds: Thresholds = Field(
        default_factory=Thresholds, description="What each lower bound must reach."
    )


class GateResult(StatusModel):
    """One gate of an acceptance set."""

    name: str = Field(max_length=32, description="Its name, as in spec.acceptance.thresholds.")
    score: float = Field(description="Mean over the pictures.")
    lower_bound: float = Field(description="Its one-sided 95 % bound.")
    threshold: float = Field(description="What the bound had to reach.")
    passed: bool = Field(description="Whether it did.")
    reason: str | None = Field(None, max_length=1024, description="Why it did not.")


class AcceptanceStatus(StatusModel):
    """What the acceptance set of one revision showed."""

    sha256: str = Field(max_length=64, description="Digest of the file or the weights.")
    passed: bool = Field(description="Whether every gate did.")
    gates: list[GateResult] = Field(
        default_factory=list, max_length=16, description="The gates, in the order of their cost."
    )
    report: str | None = Field(
        None, max_length=512, description="Key of the report in the object store."
    )
    time: Time | None = Field(None, description="When it was measured, in UTC.")


MOST_ACCEPTED = 8


class AcceptedRevision(StatusModel):
    """A revision that passed, and may serve again."""

    sha256: str = Field(max_length=64, description="Digest of the file.")
    resolved_revision: str | None = Field(
        None, max_length=1024, description="The commit, version or digest of it."
    )
    path: str = Field(max_length=4096, description="The file inside the model's pods.")
