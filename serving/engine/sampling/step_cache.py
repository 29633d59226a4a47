"""Reusing most of a step where the image hardly changed: the first-block residual cache.

The first block of the denoiser always runs. Where what it adds differs little from what it added at
the last step that ran whole, the other blocks are left out and what they added then is added again.
An option of a request (``step_cache``), because the image is then only nearly the same; the
bench ``tests/bench/engine_cache.py`` measures by how much, and how much faster it is.
Source of the method: the "first block cache" of ParaAttention, also in diffusers' hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(slots=True, eq=False)
class StepCache:
    """What one pass of one image may reuse.

    Attributes:
        threshold: relative change of the first block's part below which the rest is reused.
        first: what the first block added at the last whole step, [image tokens, width].
        rest: what the other blocks added then.
        used: steps that reused it.
    """

    threshold: float
    first: torch.Tensor | None = None
    rest: torch.Tensor | None = None
    used: int = 0

    def forget(self) -> None:
        """Makes the next step run whole."""
        self.first = self.rest = None


def fitting(caches: Sequence[StepCache | None], first: torch.Tensor) -> list[bool]:
    """For each pass of a batch, whether its cache may stand for the other blocks.

    Waits for the device once, if there is anything to compare.

    Args:
        first: what the first block added now, [passes, image tokens, width].
    """
    # Tokens are fewer, and nothing fits, when reference images are no longer looked at.
    filled = [
        i
        for i, c in enumerate(caches)
        if c is not None and c.first is not None and c.first.shape == first[i].shape
    ]
    fits = [False] * len(caches)
    if not filled:
        return fits
    # Each pass by itself: the order of a sum over a batch depends on how many are in it.
    change = torch.stack(
        [
            (first[i] - before).abs().mean() / before.abs().mean()
            for i in filled
            if (c := caches[i]) and (before := c.first) is not None
        ]
    )
    for i, value in zip(filled, change.tolist(), strict=True):
        cache = caches[i]
        fits[i] = cache is not None and value < cache.threshold
    return fits
