"""The answer of ``GET /internal/v1/training`` on the head of a training's Ray cluster.

The trainer writes it, the operator reads it. Fields that this version does not know are kept and
have no effect; an answer of a higher version is refused (`wire.document`).
"""

from __future__ import annotations

from pydantic import Field

from calotype.serving.wire.document import Document, JsonObject


class TrainingProgress(Document):
    """How far a training is."""

    step: int | None = Field(None, ge=0, description="Steps that are done.")
    loss: float | None = None
    eta_seconds: float | None = Field(None, ge=0, description="Predicted time until the end.")
    samples: list[JsonObject] | None = Field(None, description="Sample images, newest last.")
