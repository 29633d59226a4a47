"""Seeded noise of one image, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calotype.serving.engine.model.latents import TokenGrid, pack


class NoiseSource:
    """The noise that an image starts from, and more of it for samplers that ask for it.

    Drawn on the CPU whatever the device, so that a seed means the same image everywhere, and
    from one generator, in the order in which a diffusers pipeline with
    ``generator=torch.Generator("cpu").manual_seed(seed)`` would draw.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def first(self, grid: TokenGrid, token_channels: int, dtype: torch.dtype) -> torch.Tensor:
        """What an image starts from, packed: [tokens, token_channels].

        In ``dtype``, because torch draws other numbers in bfloat16 than in float32.
        """
        shape = (1, token_channels, grid.rows, grid.columns)
        return pack(torch.randn(shape, generator=self._generator, dtype=dtype))[0]

    def more(self, shape: Sequence[int]) -> torch.Tensor:
        """Fresh noise for a sampler's step, float32."""
        return torch.randn((1, *shape), generator=self._generator)[0]

    def state(self) -> torch.Tensor:
        """Where the generator is: uint8, for `restore`."""
        return self._generator.get_state()

    def restore(self, state: torch.Tensor) -> None:
        self._generator.set_state(state)
