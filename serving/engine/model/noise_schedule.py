"""The noise levels that a model's ``scheduler_config.json`` describes.

Equal to `set_timesteps` of diffusers' FlowMatchEulerDiscreteScheduler, of what FLUX.2 can use.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_KARRAS_RHO = 7.0


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """How noise levels are shifted; fields and defaults are those of diffusers.

    Attributes:
        shift: factor towards more noise, where the shift is not dynamic.
        use_dynamic_shifting: the shift depends on image size and steps (mu).
        shift_terminal: levels are stretched to end here; 0 or None leaves them.
    """

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False

    @classmethod
    def from_json(cls, content: Mapping[str, object]) -> ScheduleConfig:
        """Reads a ``scheduler_config.json``.

        Raises:
            ValueError: it asks for something that FLUX.2 does not use.
        """
        for name in ("stochastic_sampling", "invert_sigmas", "use_beta_sigmas"):
            if content.get(name):
                raise ValueError(f"{name} is not supported")
        known = {field.name for field in dataclasses.fields(cls)}
        config = cls(**{key: value for key, value in content.items() if key in known})  # type: ignore[arg-type]
        if config.time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type {config.time_shift_type!r} is not known")
        if config.use_karras_sigmas and config.use_exponential_sigmas:
            raise ValueError("use_karras_sigmas and use_exponential_sigmas exclude each other")
        return config

    def sigmas(self, unshifted: Sequence[float], mu: float) -> tuple[float, ...]:
        """Noise levels in float32, 0 behind them.

        Args:
            unshifted: levels before the shift, falling from 1.
            mu: how far a dynamic shift goes.
        """
        levels: np.ndarray = np.array(unshifted).astype(np.float32)
        if not self.use_dynamic_shifting:
            levels = self.shift * levels / (1 + (self.shift - 1) * levels)
        elif self.time_shift_type == "exponential":
            levels = math.exp(mu) / (math.exp(mu) + (1 / levels - 1) ** 1.0)
        else:
            levels = mu / (mu + (1 / levels - 1) ** 1.0)
        if self.shift_terminal:
            rest = 1 - levels
            levels = 1 - rest / (rest[-1] / (1 - self.shift_terminal))
        if self.use_karras_sigmas:
            ramp = np.linspace(0, 1, len(levels))
            high, low = (float(level) ** (1 / _KARRAS_RHO) for level in (levels[0], levels[-1]))
            levels = (high + ramp * (low - high)) ** _KARRAS_RHO
        elif self.use_exponential_sigmas:
            ends = math.log(float(levels[0])), math.log(float(levels[-1]))
            levels = np.exp(np.linspace(*ends, len(levels)))
        return (*levels.astype(np.float32).tolist(), 0.0)
