"""How noise becomes a picture, step by step: one Sampler per picture.

diffusers' schedulers keep their step index and history inside, so no instance of one is shared
between pictures. "Scheduler" alone means `scheduler.StepScheduler`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from calotype.serving.engine import libraries
from calotype.serving.errors import InvalidRequest


class Sampler(Protocol):
    """Stepping state of one picture.

    Attributes:
        evaluations: denoiser calls in all; a sampler may need several for one step.
        done: evaluations that are behind it.
    """

    evaluations: int
    done: int

    @property
    def timestep(self) -> float:
        """What the denoiser is told at the next evaluation: 1 is noise, 0 the picture."""
        ...

    @property
    def sigma(self) -> float:
        """Share of noise in the latents now; latents - sigma * velocity estimates the picture."""
        ...

    def linear_step(self) -> float | None:
        """``dt`` if the next step is ``latents + dt * velocity``, so that the engine can step all
        rows of a batch at once and then call `advance`; None if it must call `step`.
        """
        ...

    def advance(self) -> None:
        """Counts a step that the engine made with `linear_step`."""
        ...

    def step(self, velocity: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Next latents of this picture, both [tokens, channels]."""
        ...


@dataclass(frozen=True, slots=True)
class FlowSchedule:
    """Numbers of one schedule; the last sigma is 0, where no evaluation is made."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    deltas: tuple[float, ...]


class FlowEulerSampler:
    """Euler steps along the flow: diffusers' FlowMatchEulerDiscreteScheduler as FLUX.2 sets it.

    The schedule is that of Flux2Pipeline: sigmas from 1 to 1 / steps, shifted by FLUX.2's empirical
    mu where the model's scheduler shifts dynamically, by its own fixed shift otherwise.
    """

    def __init__(
        self, schedule: Mapping[str, Any], steps: int, tokens: int, dtype: torch.dtype
    ) -> None:
        self._numbers = _flow_schedule(tuple(sorted(schedule.items())), steps, tokens, dtype)
        self.evaluations = steps
        self.done = 0

    @property
    def timestep(self) -> float:
        return self._numbers.timesteps[self.done]

    @property
    def sigma(self) -> float:
        return self._numbers.sigmas[self.done]

    def linear_step(self) -> float | None:
        return self._numbers.deltas[self.done]

    def advance(self) -> None:
        self.done += 1

    def step(self, velocity: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        stepped = latents.float() + self._numbers.deltas[self.done] * velocity
        self.done += 1
        return stepped.to(velocity.dtype)


@lru_cache(maxsize=256)
def _flow_schedule(
    schedule: tuple[tuple[str, Any], ...], steps: int, tokens: int, dtype: torch.dtype
) -> FlowSchedule:
    # Kept, because a scheduler costs about as much to set up as a small model's step, and the
    # numbers of an Euler schedule are all that is ever read of it.
    scheduler = libraries.flow_euler_class()(**dict(schedule))
    sigmas = np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(steps, device="cpu", sigmas=sigmas, mu=empirical_mu(tokens, steps))
    # The pipeline hands the timestep over in the latents' dtype; rounding is part of the match.
    timesteps = scheduler.timesteps.to(dtype) / 1000
    return FlowSchedule(
        tuple(timesteps.tolist()),
        tuple(scheduler.sigmas.tolist()),
        tuple(scheduler.sigmas.diff().tolist()),
    )


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


SamplerFactory = Callable[[Mapping[str, Any], int, int, torch.dtype], Sampler]
"""(schedule, steps, image tokens, dtype of the latents) to a Sampler."""

SAMPLERS: dict[str, SamplerFactory] = {"flow-euler": FlowEulerSampler}


def build_sampler(
    name: str, schedule: Mapping[str, Any], steps: int, tokens: int, dtype: torch.dtype
) -> Sampler:
    """The sampler of one picture.

    Raises:
        InvalidRequest: there is no sampler of this name.
    """
    factory = SAMPLERS.get(name)
    if factory is None:
        raise InvalidRequest(
            f"sampler must be one of {', '.join(sorted(SAMPLERS))}; got {name!r}.", param="sampler"
        )
    return factory(schedule, steps, tokens, dtype)
