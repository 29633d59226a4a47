"""How long a job will keep a device busy, learned from the jobs before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calotype.serving.core.request import ImageSize

PRIOR_SECONDS_PER_MEGAPIXEL_STEP = 0.2
"""Before anything was measured: about an A100's speed with FLUX.2 [dev] at 1024x1024."""
_LEARNING_RATE = 0.2
_MAX_SHAPES = 256


def work_units(request: Mapping[str, Any]) -> float:
    """Megapixels x steps x pictures of a `GenerationRequest` payload."""
    size = ImageSize.parse(str(request["rendered_size"]))
    return max(1e-6, size.pixels / 1e6 * int(request["steps"]) * int(request["n"]))


def shape_of(request: Mapping[str, Any]) -> str:
    """What decides the time of one picture: drawn size and steps."""
    return f"{request['rendered_size']}/{request['steps']}"


class WorkPredictor:
    """Seconds of one picture per shape, and per unit of work for shapes never seen.

    Both are exponentially weighted means of what was measured.
    """

    def __init__(self, seconds_per_unit: float = PRIOR_SECONDS_PER_MEGAPIXEL_STEP) -> None:
        self.seconds_per_unit = seconds_per_unit
        self.measured = False
        self._shapes: dict[str, float] = {}

    def predict(self, request: Mapping[str, Any]) -> float:
        """Device seconds of all pictures of a `GenerationRequest` payload."""
        one = self._shapes.get(shape_of(request))
        if one is not None:
            return one * int(request["n"])
        return self.seconds_per_unit * work_units(request)

    def learn(self, request: Mapping[str, Any], seconds: float) -> None:
        """Takes one measured run; the first one replaces the prior."""
        if not 0 < seconds < float("inf"):
            return
        measured = seconds / work_units(request)
        rate = _LEARNING_RATE if self.measured else 1.0
        self.seconds_per_unit += rate * (measured - self.seconds_per_unit)
        self.measured = True
        shape, one = shape_of(request), seconds / int(request["n"])
        known = self._shapes.pop(shape, one)
        self._shapes[shape] = known + _LEARNING_RATE * (one - known)
        if len(self._shapes) > _MAX_SHAPES:
            del self._shapes[next(iter(self._shapes))]

    def to_payload(self) -> dict[str, Any]:
        return {
            "seconds_per_unit": self.seconds_per_unit,
            "measured": self.measured,
            "shapes": dict(self._shapes),
        }

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> WorkPredictor:
        """What `to_payload` wrote; a fresh one from nothing."""
        found = cls(payload.get("seconds_per_unit", PRIOR_SECONDS_PER_MEGAPIXEL_STEP))
        found.measured = bool(payload.get("measured"))
        found._shapes = dict(payload.get("shapes", {}))
        return found
