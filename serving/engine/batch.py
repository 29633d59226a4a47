"""Requests in flight, as the engine holds them between two steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from calotype.serving.engine.latents import TokenGrid
from calotype.serving.engine.lora_layers import Adapter, Stack
from calotype.serving.engine.samplers import Sampler
from calotype.serving.engine.scheduler import Bucket
from calotype.serving.request import GenerationRequest

if TYPE_CHECKING:
    from calotype.serving.request import Pixels


@dataclass(slots=True, eq=False)
class Row:
    """One picture in the making.

    Attributes:
        embeds: [text tokens, joint_attention_dim].
        latents: [image tokens, token channels]; None until its first step, so that waiting
            requests cost no memory.
        stack: its adapters; filled in when the request starts.
    """

    request_id: str
    index: int
    seed: int
    sampler: Sampler
    guidance: float
    embeds: torch.Tensor
    latents: torch.Tensor | None = None
    stack: Stack = ()

    @property
    def finished(self) -> bool:
        return self.sampler.done >= self.sampler.evaluations


@dataclass(slots=True, eq=False)
class DenoiseState:
    """One request in flight.

    Attributes:
        images: finished pictures by index.
        pinned: adapters to release at the end.
        seconds: its share of the time of every batch that it was in.
        reported: denoise steps told by `Progress` so far.
    """

    request: GenerationRequest
    bucket: Bucket
    grid: TokenGrid
    rows: list[Row]
    images: dict[int, Pixels] = field(default_factory=dict)
    pinned: list[Adapter] = field(default_factory=list)
    seconds: float = 0.0
    reported: int = 0

    @property
    def steps_done(self) -> int:
        """Denoise steps behind the slowest of its pictures."""
        steps = self.request.sampling.steps
        return min(r.sampler.done * steps // r.sampler.evaluations for r in self.rows)
