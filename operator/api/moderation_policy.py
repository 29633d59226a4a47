"""ModerationPolicy as a resource: the safety stage's policy, by name and version."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from calotype.moderation.policy.spec import PolicySpec
from calotype.serving.config.base import Resource
from calotype.serving.config.conditions import Status


class ModerationPolicyStatus(Status):
    """What the operator knows about a policy."""

    sha256: str | None = Field(
        None, max_length=64, description="Digest of the policy, as decisions name it."
    )
    used_by: int | None = Field(
        None, ge=0, description="ImageModels, LoRAAdapters and Teams that use it."
    )


class ModerationPolicy(Resource):
    """What may pass the safety stage: categories, thresholds and actions."""

    kind: Literal["ModerationPolicy"] = "ModerationPolicy"
    spec: PolicySpec
