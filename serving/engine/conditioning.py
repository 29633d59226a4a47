"""What a picture is drawn after, besides its prompt: given pictures, masks, reference pictures.

A request's `Conditions` act on the denoise loop at four places, and nowhere else:

* ``references``: tokens behind the picture's own, at every evaluation (`denoiser.Denoiser`);
* `noised`: what the latents are before the first evaluation;
* `kept`: what the latents are after each step;
* `Bucket.references`: the token layout, which decides who may share a step.

ControlNet-like conditions join at the first place (a control map is a reference with a role) or in
`forward.Forward`, whose blocks are called one by one; image-prompt adapters add to
``Pass.embeds``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True, eq=False)
class Conditions:
    """Shared by all pictures of a request.

    Attributes:
        references: [reference tokens, token channels] of all reference pictures.
        start: latents of the picture to start from, [tokens, token channels].
        redraw: [tokens, 1], 1 where the picture is drawn anew and 0 where ``start`` stays.
    """

    references: torch.Tensor | None = None
    start: torch.Tensor | None = None
    redraw: torch.Tensor | None = None

    def noised(self, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """Latents at a noise level: ``start`` under noise, or noise alone."""
        if self.start is None:
            return noise
        return _mixed(self.start, noise, sigma)

    def kept(self, latents: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """Latents after a step to a noise level, with ``start`` back where it stays.

        As diffusers' inpainting pipelines blend.
        """
        if self.start is None or self.redraw is None:
            return latents
        given = _mixed(self.start, noise, sigma)
        return (1 - self.redraw) * given + self.redraw * latents


def _mixed(start: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    return sigma * noise + (1.0 - sigma) * start
