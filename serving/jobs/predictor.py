"""How long a job will keep a device busy, learned from the jobs before it."""

from __future__ import annotations

from dataclasses import dataclass

from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.request import ImageSize

PRIOR_SECONDS_PER_MEGAPIXEL_STEP = 0.2
"""Before anything was measured: about an A100's speed with FLUX.2 [dev] at 1024x1024."""
_LEARNING_RATE = 0.2
_MAX_SHAPES = 256


@dataclass(frozen=True, slots=True)
class Work:
    """What decides how long a request keeps a device busy."""

    rendered_size: str
    steps: int
    n: int
    """Images."""

    @classmethod
    def from_request(cls, payload: JsonObject) -> Work:
        """Of a `GenerationRequest` payload."""
        return cls(str(payload["rendered_size"]), int(payload["steps"]), int(payload["n"]))

    @property
    def units(self) -> float:
        """Megapixels x steps x images."""
        size = ImageSize.parse(self.rendered_size)
        return max(1e-6, size.pixels / 1e6 * self.steps * self.n)

    @property
    def shape(self) -> str:
        """What decides the time of one image."""
        return f"{self.rendered_size}/{self.steps}"


class WorkPredictor:
    """Seconds of one image per shape, and per unit of work for shapes never seen.

    Both are exponentially weighted means of what was measured.
    """

    def __init__(self, seconds_per_unit: float = PRIOR_SECONDS_PER_MEGAPIXEL_STEP) -> None:
        self.seconds_per_unit = seconds_per_unit
        self.measured = False
        self._shapes: dict[str, float] = {}

    def predict(self, work: Work) -> float:
        """Device seconds of all images."""
        one = self._shapes.get(work.shape)
        return self.seconds_per_unit * work.units if one is None else one * work.n

    def learn(self, work: Work, seconds: float) -> None:
        """Takes one measured run; the first one replaces the prior."""
        if not 0 < seconds < float("inf"):
            return
        measured = seconds / work.units
        rate = _LEARNING_RATE if self.measured else 1.0
        self.seconds_per_unit += rate * (measured - self.seconds_per_unit)
        self.measured = True
        shape, one = work.shape, seconds / work.n
        known = self._shapes.pop(shape, one)
        self._shapes[shape] = known + _LEARNING_RATE * (one - known)
        if len(self._shapes) > _MAX_SHAPES:
            del self._shapes[next(iter(self._shapes))]

    def to_payload(self) -> JsonObject:
        return {
            "seconds_per_unit": self.seconds_per_unit,
            "measured": self.measured,
            "shapes": dict(self._shapes),
        }

    @classmethod
    def from_payload(cls, payload: JsonObject) -> WorkPredictor:
        """What `to_payload` wrote, as a part of a forecast; a fresh one from nothing."""
        found = cls(payload.get("seconds_per_unit", PRIOR_SECONDS_PER_MEGAPIXEL_STEP))
        found.measured = bool(payload.get("measured"))
        found._shapes = dict(payload.get("shapes", {}))
        return found
