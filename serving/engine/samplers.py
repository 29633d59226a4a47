"""How noise becomes a picture, step by step: one Sampler per picture.

A Sampler owns a diffusers scheduler instance, because those keep their step index and history
inside; nothing is shared between requests. "Scheduler" alone means `scheduler.StepScheduler`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

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


class FlowEulerSampler:
    """Euler steps along the flow: diffusers' FlowMatchEulerDiscreteScheduler as FLUX.2 sets it.

    The schedule is that of Flux2Pipeline: sigmas from 1 to 1 / steps, shifted by FLUX.2's empirical
    mu where the model's scheduler shifts dynamically, by its own fixed shift otherwise.
    """

    def __init__(
        self, schedule: Mapping[str, Any], steps: int, tokens: int, dtype: torch.dtype
    ) -> None:
        self._scheduler = libraries.flow_euler_class()(**schedule)
        sigmas = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
        self._scheduler.set_timesteps(
            steps, device="cpu", sigmas=sigmas, mu=empirical_mu(tokens, steps)
        )
        self._scheduler.set_begin_index(0)
        # The pipeline hands the timestep over in the latents' dtype; rounding is part of the match.
        self._timesteps: list[float] = (self._scheduler.timesteps.to(dtype) / 1000).tolist()
        self._sigmas: list[float] = self._scheduler.sigmas.tolist()
        self._deltas: list[float] = self._scheduler.sigmas.diff().tolist()
        self._stochastic = bool(self._scheduler.config.stochastic_sampling)
        self.evaluations = steps
        self.done = 0

    @property
    def timestep(self) -> float:
        return self._timesteps[self.done]

    @property
    def sigma(self) -> float:
        return self._sigmas[self.done]

    def linear_step(self) -> float | None:
        return self._deltas[self.done]

    def advance(self) -> None:
        self.done += 1

    def step(self, velocity: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        stepped = latents.float() + self._deltas[self.done] * velocity
        self.done += 1
        return stepped.to(velocity.dtype)


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
