"""What images in the making take of the device's memory."""

from __future__ import annotations

import torch

from calotype.serving.engine.execution.batch import DenoiseState
from calotype.serving.engine.model.components import Components
from calotype.serving.engine.sampling.samplers import LinearSampler
from calotype.serving.engine.scheduling.scheduler import Memory
from calotype.serving.engine.sizing.model_sizes import TokenMemory

_USABLE = 0.9
"""Share of what is free that is planned with; the rest is lost between allocations."""


class Footprint:
    """Reckons memory for the scheduler.

    Args:
        memory_bytes: room besides the weights; None is what is free on a CUDA device, and no limit
            on a CPU.
    """

    def __init__(self, components: Components, memory_bytes: float | None) -> None:
        self._width: int = components.denoiser.inner_dim
        self._channels: int = components.denoiser.config.in_channels
        self._item = components.dtype.itemsize
        if memory_bytes is None and components.device.type == "cuda":
            memory_bytes = _USABLE * torch.cuda.mem_get_info(components.device)[0]
        self.memory: Memory | None = None
        """What the scheduler may plan with; None is no limit."""
        if memory_bytes is not None:
            token = TokenMemory.of(components.denoiser.config).bytes(components.precision)
            self.memory = Memory(memory_bytes, token)

    def row(self, state: DenoiseState) -> float:
        """Bytes that one image of a request keeps from step to step."""
        row = state.rows[0]
        kept = 2.0 if state.inputs.redraw is not None else 1.0
        if isinstance(row.sampler, LinearSampler):
            kept += row.sampler.plan.remembered * 4 / self._item
        latents = state.grid.tokens * self._channels * self._item * kept
        seen = state.bucket.tokens - state.bucket.text_tokens
        caches = sum(1 for one in row.passes if one.cache is not None)
        return latents + caches * 2 * seen * self._width * self._item
