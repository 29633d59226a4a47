"""Requests in flight, as the engine holds them between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from calotype.serving.core.request import GenerationRequest
from calotype.serving.engine.control.hints import Controls
from calotype.serving.engine.lora.lora_layers import Adapter, Stack
from calotype.serving.engine.model.conditioning import Conditions
from calotype.serving.engine.model.input_images import InputImages
from calotype.serving.engine.model.latents import TokenGrid
from calotype.serving.engine.sampling.noise import NoiseSource
from calotype.serving.engine.sampling.samplers import Sampler
from calotype.serving.engine.sampling.step_cache import StepCache
from calotype.serving.engine.scheduling.scheduler import Bucket

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels


@dataclass(slots=True, eq=False)
class Pass:
    """One run of an image through the denoiser in a step.

    Attributes:
        embeds: [text tokens, joint_attention_dim].
        guidance: what the denoiser is given, where it takes a guidance.
        cache: what it may reuse of the last step; None never reuses anything.
    """

    embeds: torch.Tensor
    guidance: float
    cache: StepCache | None = None


@dataclass(slots=True, eq=False)
class Row:
    """One image in the making.

    Attributes:
        passes: the prompt, and the negative prompt if there is one.
        true_guidance: weight of the first pass against the second.
        conditions: what its image is drawn after, shared by the rows of a request; filled in
            when the request starts.
        latents: [image tokens, token channels]; None until its first step, so that waiting
            requests cost no memory.
        start_noise: what it started from, kept where parts of an image are noised again.
        stack: its adapters; filled in when the request starts.
        controls: its control maps; likewise.
        steps: denoise steps of its image.
    """

    request_id: str
    index: int
    seed: int
    sampler: Sampler
    noise: NoiseSource
    passes: tuple[Pass, ...]
    true_guidance: float
    conditions: Conditions = field(default_factory=Conditions)
    latents: torch.Tensor | None = None
    start_noise: torch.Tensor | None = None
    stack: Stack = ()
    controls: Controls = ()
    steps: int = 1

    @property
    def step(self) -> int:
        """The denoise step that comes next, from 0."""
        return steps_done(self.sampler, self.steps)

    @property
    def finished(self) -> bool:
        return self.sampler.done >= self.sampler.evaluations


@dataclass(slots=True, eq=False)
class DenoiseState:
    """One request in flight.

    Attributes:
        steps: denoise steps that are run, fewer than the request names where it starts from a
            image.
        inputs: the images that the request brought.
        maps: its control maps, at the size that is drawn.
        images: finished images by index.
        pinned: adapters to release at the end.
        seconds: its share of the time of every batch that it was in.
        reported: denoise steps told by `Progress` so far.
        saved: steps at the last checkpoint.
        revisions: of the adapters that its checkpoint was taken with; None without a checkpoint.
        deadline: on the engine's clock; None is none.
        row_bytes: memory that one of its images takes between steps.
    """

    request: GenerationRequest
    bucket: Bucket
    grid: TokenGrid
    rows: list[Row]
    steps: int
    inputs: InputImages = field(default_factory=InputImages)
    maps: tuple[Pixels, ...] = ()
    images: dict[int, Pixels] = field(default_factory=dict)
    pinned: list[Adapter] = field(default_factory=list)
    seconds: float = 0.0
    reported: int = 0
    saved: int = 0
    revisions: dict[str, str] | None = None
    deadline: float | None = None
    row_bytes: float = 0.0

    @property
    def steps_done(self) -> int:
        """Denoise steps behind the slowest of its images."""
        return min(steps_done(r.sampler, self.steps) for r in self.rows)

    @property
    def caches(self) -> Sequence[StepCache]:
        return [p.cache for row in self.rows for p in row.passes if p.cache is not None]


def steps_done(sampler: Sampler, steps: int) -> int:
    """Whole steps that a sampler has behind it; a step may take several evaluations."""
    return sampler.done * steps // sampler.evaluations
