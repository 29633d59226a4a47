"""Objects inside a request body, and what all of them share."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from calotype.serving.core.conditions import GIVEN, MAX_CONTROL_SCALE, Role

MOST_NAMES = 100
"""In one object of a body."""


def bounded(given: object, most: int) -> object:
    """What is given, if it is no object of too many names."""
    if isinstance(given, dict) and len(given) > most:
        raise PydanticCustomError(
            "too_long", "There should be at most {most} names", {"most": most}
        )
    return given


class Body(BaseModel):
    """Strict: no unknown names, no ``"2"`` for 2, no infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _bound(cls, given: object) -> object:
        """Pydantic makes an error of each unknown name: half a second for a body full of them."""
        return bounded(given, MOST_NAMES)


class LoRA(Body):
    id: str = Field(description="Name of a LoRAAdapter of the model.")
    scale: float | None = Field(None, description="Strength; the adapter's default if missing.")


class Margins(Body):
    """Pixels by which a picture is continued beyond its edges."""

    left: int = Field(0, ge=0, le=8192)
    top: int = Field(0, ge=0, le=8192)
    right: int = Field(0, ge=0, le=8192)
    bottom: int = Field(0, ge=0, le=8192)


class ControlNet(Body):
    id: str = Field(description="Name of a control adapter of the model.")
    image: Any = Field(
        description="A URL, or {image_url} or {file_id}: the map, or the picture it is made of."
    )
    type: str = Field(
        GIVEN,
        max_length=64,
        description="none: the image is the map. canny: edges are found in it. Others (depth, "
        "pose, segmentation) where a package of that name is installed.",
    )
    scale: float | None = Field(
        None, ge=0, le=MAX_CONTROL_SCALE, description="Strength; the adapter's default if missing."
    )
    start: float = Field(0.0, ge=0, le=1, description="Share of the steps after which it begins.")
    end: float = Field(1.0, ge=0, le=1, description="Share of the steps after which it ends.")


class ReferenceOptions(Body):
    """How a reference image is looked at; what is missing follows from the role."""

    role: Role | None = Field(None, description="What of it counts; sets the other options.")
    strength: float | None = Field(None, gt=0, le=4, description="Weight in attention.")
    start: float | None = Field(None, ge=0, le=1, description="Share of the steps before it.")
    end: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the steps after which it is no longer looked at, and costs nothing.",
    )
    max_pixels: int | None = Field(
        None, ge=64 * 64, le=1024 * 1024, description="It is made no larger than this."
    )
