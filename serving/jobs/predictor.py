"""How long a job will keep a device busy, learned from the jobs before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calotype.serving.request import ImageSize

PRIOR_SECONDS_PER_MEGAPIXEL_STEP = 0.2
"""Before anything was measured: about an A100's speed with FLUX.2 [dev] at 1024x1024."""
_LEARNING_RATE = 0.2


def work_units(request: Mapping[str, Any]) -> float:
    """Megapixels x steps x pictures of a `GenerationRequest` payload."""
    size = ImageSize.parse(str(request["rendered_size"]))
    return max(1e-6, size.pixels / 1e6 * int(request["steps"]) * int(request["n"]))


class WorkPredictor:
    """Seconds per unit of work, as an exponentially weighted mean of what was measured."""

    def __init__(self, seconds_per_unit: float = PRIOR_SECONDS_PER_MEGAPIXEL_STEP) -> None:
        self.seconds_per_unit = seconds_per_unit
        self._measured = False

    def predict(self, request: Mapping[str, Any]) -> float:
        return self.seconds_per_unit * work_units(request)

    def learn(self, request: Mapping[str, Any], seconds: float) -> None:
        """Takes one measured run; the first one replaces the prior."""
        if not 0 < seconds < float("inf"):
            return
        measured = seconds / work_units(request)
        rate = _LEARNING_RATE if self._measured else 1.0
        self.seconds_per_unit += rate * (measured - self.seconds_per_unit)
        self._measured = True
