"""Which noise levels an image passes through: FLUX.2's schedule for a size and a number of steps.

Every sampler walks the same schedule; `samplers` says how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from calotype.serving.engine.model.noise_schedule import ScheduleConfig

TRAIN_TIMESTEPS = 1000
"""FLUX.2 counts noise in thousandths; its denoiser is given thousandths over a thousand."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Noise levels of one image.

    Attributes:
        sigmas: share of noise, falling; 1 is noise only. The last one is 0, the image, so there
            is one more than there are steps.
        dtype: of the latents. The denoiser is given the noise in it, as Flux2Pipeline does.
    """

    sigmas: tuple[float, ...]
    dtype: torch.dtype

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def timesteps(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """What the denoiser is given at noise levels: these, rounded as the pipeline rounds."""
        scaled = torch.tensor(sigmas, dtype=torch.float32) * TRAIN_TIMESTEPS
        return tuple((scaled.to(self.dtype) / TRAIN_TIMESTEPS).tolist())


def build_schedule(
    config: ScheduleConfig,
    steps: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    sigmas: Sequence[float] = (),
    strength: float = 1.0,
) -> Schedule:
    """The schedule of an image.

    Sigmas from 1 to 1 / steps, shifted by FLUX.2's empirical mu where the model's scheduler shifts
    dynamically, by its own fixed shift otherwise: the schedule of Flux2Pipeline.

    Args:
        config: of the model.
        tokens: image tokens of the image.
        sigmas: other sigmas before the shift, as the pipeline's parameter of this name; one for
            each step.
        strength: share of the steps that is run, from the end: below 1, a given image is only
            noised so far, and the first steps are left out.
    """
    whole = _shifted(config, steps, tokens, tuple(sigmas))
    # As diffusers' image-to-image pipelines count: the steps that are run are rounded up.
    skipped = int(max(steps - min(steps * strength, steps), 0))
    return Schedule(whole[skipped:], dtype)


@lru_cache(maxsize=256)
def _shifted(
    config: ScheduleConfig, steps: int, tokens: int, sigmas: tuple[float, ...]
) -> tuple[float, ...]:
    unshifted = sigmas or tuple(np.linspace(1.0, 1 / steps, steps).tolist())
    return config.sigmas(unshifted, empirical_mu(tokens, steps))


def empirical_mu(tokens: int, steps: int) -> float:
    """FLUX.2's schedule shift for a number of image tokens and steps.

    Source: ``compute_empirical_mu`` of diffusers' pipeline_flux2, from black-forest-labs/flux2.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + at_200 - 200.0 * slope
