"""How noise becomes an image, step by step: one Sampler per image.

A user's package adds one by an entry point of the group ``calotype.samplers``, whose name is what
requests say and whose object is a `SamplerFactory`::

    [project.entry-points."calotype.samplers"]
    flow-mine = "my_package:build"

"Scheduler" alone means `scheduler.StepScheduler`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch

from calotype.serving.core.errors import EngineError, InvalidRequest
from calotype.serving.core.request import SAMPLER_ENTRY_POINTS
from calotype.serving.engine.sampling import solvers
from calotype.serving.engine.sampling.linear_plan import (
    LATENTS,
    NOISE,
    REMEMBERED,
    VELOCITY,
    LinearPlan,
    Weights,
    apply,
    observe,
)
from calotype.serving.engine.sampling.noise import NoiseSource
from calotype.serving.engine.sampling.schedule import Schedule


class Sampler(Protocol):
    """Stepping state of one image; nothing of it is shared with another image.

    Attributes:
        evaluations: denoiser calls in all; a sampler may need several for one step.
        done: evaluations that are behind it; `step` counts it up.
    """

    evaluations: int
    done: int

    @property
    def timestep(self) -> float:
        """What the denoiser is given at the next evaluation: 1 is noise, 0 the image."""
        ...

    @property
    def sigma(self) -> float:
        """Share of noise in the latents that the next evaluation sees; after the last one 0.

        latents - sigma * velocity estimates the image.
        """
        ...

    def step(self, velocity: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Next latents of this image, both [tokens, channels], in the velocity's dtype."""
        ...

    def remembered(self) -> list[torch.Tensor]:
        """Tensors that it needs for its next step, for a checkpoint."""
        ...

    def restore(self, done: int, remembered: Sequence[torch.Tensor]) -> None:
        """Goes to where a checkpoint was taken."""
        ...


SamplerFactory = Callable[[Schedule, NoiseSource], Sampler]
"""From the noise levels and the noise of one image to its Sampler."""


class LinearSampler:
    """A sampler that follows a `LinearPlan`; many of them are stepped at once."""

    def __init__(self, plan: LinearPlan, noise: NoiseSource) -> None:
        self.plan = plan
        self.evaluations = plan.evaluations
        self.done = 0
        self._noise = noise
        self._remembered: list[torch.Tensor] = []

    @property
    def timestep(self) -> float:
        return self.plan.timesteps[self.done]

    @property
    def sigma(self) -> float:
        return self.plan.sigmas[self.done] if self.done < self.evaluations else 0.0

    def step(self, velocity: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return step_together([self], velocity.unsqueeze(0), latents.unsqueeze(0))[0]

    def remembered(self) -> list[torch.Tensor]:
        return list(self._remembered)

    def restore(self, done: int, remembered: Sequence[torch.Tensor]) -> None:
        self.done = done
        self._remembered = list(remembered)

    def _weights(self) -> Weights:
        return self.plan.weights[self.done]

    def _draw(self, like: torch.Tensor) -> torch.Tensor:
        """Fresh noise where this evaluation wants some, zeros elsewhere."""
        if any(row[NOISE] for row in self._weights()):
            return self._noise.more(like.shape).to(like.device, non_blocking=True)
        return torch.zeros_like(like, dtype=torch.float32)


def step_together(
    samplers: Sequence[LinearSampler], velocity: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    """Steps the images of a batch; all samplers remember equally many tensors.

    Args:
        velocity: [rows, tokens, channels].
        latents: likewise; what the velocity was predicted from.
    """
    tables = [sampler._weights() for sampler in samplers]
    summands: list[torch.Tensor | None] = [None] * (REMEMBERED + samplers[0].plan.remembered)
    summands[LATENTS], summands[VELOCITY] = latents, velocity
    if any(row[NOISE] for table in tables for row in table):
        summands[NOISE] = torch.stack([sampler._draw(latents[0]) for sampler in samplers])
    for slot in range(samplers[0].plan.remembered):
        if any(row[REMEMBERED + slot] for table in tables for row in table):
            # Before a sampler's first step it remembers nothing, and gives nothing a weight.
            nothing = torch.zeros_like(latents[0], dtype=torch.float32)
            summands[REMEMBERED + slot] = torch.stack(
                [s._remembered[slot] if s._remembered else nothing for s in samplers]
            )
    stepped, *kept = apply(tables, summands)
    for row, sampler in enumerate(samplers):
        sampler._remembered = [tensor[row] for tensor in kept]
        sampler.done += 1
    return stepped.to(velocity.dtype)


# The samplers of the package


_UNIPC_MARGIN = 1e-6


def _linear(plan: Callable[[Schedule], LinearPlan]) -> SamplerFactory:
    kept = lru_cache(maxsize=256)(plan)

    def build(schedule: Schedule, noise: NoiseSource) -> LinearSampler:
        return LinearSampler(kept(schedule), noise)

    return build


def _planned(
    schedule: Schedule, levels: tuple[float, ...], weights: tuple[Weights, ...]
) -> LinearPlan:
    return LinearPlan(levels, schedule.timesteps(levels), weights, len(weights[0]) - 1)


def _euler(schedule: Schedule) -> LinearPlan:
    """FlowMatchEulerDiscreteScheduler: straight along the velocity."""
    sigmas = torch.tensor(schedule.sigmas)
    return _planned(
        schedule,
        schedule.sigmas[:-1],
        tuple(((1.0, delta, 0.0),) for delta in sigmas.diff().tolist()),
    )


def _heun(schedule: Schedule) -> LinearPlan:
    """FlowMatchHeunDiscreteScheduler: each step but the last one is looked at from both ends."""
    first, inner = schedule.sigmas[:1], schedule.sigmas[1:-1]
    levels = (*first, *(sigma for sigma in inner for _ in range(2)))
    return _planned(schedule, levels, observe(solvers.heun(schedule.sigmas), remembered=2))


def _dpmpp_2m(schedule: Schedule) -> LinearPlan:
    """DPMSolverMultistepScheduler, DPM-Solver++ of order 2 (arXiv 2211.01095)."""
    weights = observe(solvers.dpmpp_2m(schedule.sigmas), remembered=1)
    return _planned(schedule, schedule.sigmas[:-1], weights)


def _unipc(schedule: Schedule) -> LinearPlan:
    """UniPCMultistepScheduler of order 2 (arXiv 2302.04867)."""
    first = schedule.sigmas[0]
    if abs(first - 1) < _UNIPC_MARGIN:
        # As diffusers does: at a sigma of 1 the solver's logarithms are infinite.
        first = torch.tensor(first - _UNIPC_MARGIN).item()
    sigmas = (first, *schedule.sigmas[1:])
    return _planned(schedule, sigmas[:-1], observe(solvers.unipc(sigmas), remembered=3))


def _lcm(schedule: Schedule) -> LinearPlan:
    """FlowMatchLCMScheduler: to the estimated image and back to the next noise level, with
    fresh noise. For models distilled to a few steps.
    """
    pairs = zip(schedule.sigmas[:-1], schedule.sigmas[1:], strict=True)
    return _planned(
        schedule,
        schedule.sigmas[:-1],
        tuple((((1 - after), -(1 - after) * before, after),) for before, after in pairs),
    )


SAMPLERS: Mapping[str, SamplerFactory] = {
    "flow-euler": _linear(_euler),
    "flow-heun": _linear(_heun),
    "flow-dpmpp-2m": _linear(_dpmpp_2m),
    "flow-unipc": _linear(_unipc),
    "flow-lcm": _linear(_lcm),
}


@lru_cache(maxsize=1)
def _added() -> dict[str, importlib.metadata.EntryPoint]:
    """Entry points of other packages by name; loaded when a request first names them."""
    found = importlib.metadata.entry_points(group=SAMPLER_ENTRY_POINTS)
    return {entry.name: entry for entry in found}


def build_sampler(name: str, schedule: Schedule, noise: NoiseSource) -> Sampler:
    """The sampler of one image.

    Raises:
        InvalidRequest: there is no sampler of this name.
        EngineError: the package that adds it cannot be loaded.
    """
    factory = SAMPLERS.get(name)
    if factory is None:
        entry = _added().get(name)
        if entry is None:
            known = ", ".join(sorted({*SAMPLERS, *_added()}))
            raise InvalidRequest(f"sampler must be one of {known}; got {name!r}.", param="sampler")
        try:
            return _built(entry, schedule, noise)
        except Exception as fault:  # code of somebody else's package
            raise EngineError(
                f"The sampler {name!r} of {entry.value} cannot be used: {fault!r}."
            ) from fault
    return factory(schedule, noise)


def _built(entry: Any, schedule: Schedule, noise: NoiseSource) -> Sampler:
    sampler: Sampler = entry.load()(schedule, noise)
    return sampler
