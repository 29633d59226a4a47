"""What an image is drawn after, besides its prompt: given images, masks, reference images.

A request's `Conditions` act on the denoise loop at four places, and nowhere else:

* ``references``: tokens behind the image's own (`denoiser.Denoiser`), at every evaluation or
  those that ``uses`` say;
* `noised`: what the latents are before the first evaluation;
* `kept`: what the latents are after each step;
* `Bucket.references`: the token layout, which decides who may share a step.

Control maps are no conditions but branches beside the denoiser (`control.hints`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from calotype.serving.core.conditions import ReferenceUse, acts
from calotype.serving.engine.model.autoencoder import Autoencoder
from calotype.serving.engine.model.decoder import TILE_ABOVE_PIXELS
from calotype.serving.engine.model.input_images import InputImages
from calotype.serving.engine.model.latents import normalize, pack, patchify

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels


Seen = tuple[tuple[int, float], ...]
"""Places of reference images, each with its strength."""


@dataclass(slots=True, eq=False)
class Conditions:
    """Shared by all images of a request.

    Attributes:
        references: [reference tokens, token channels] of all reference images.
        start: latents of the image to start from, [tokens, token channels].
        redraw: [tokens, 1], 1 where the image is drawn anew and 0 where ``start`` stays.
        uses: how each reference is looked at; empty = all of them, all the time, as trained.
    """

    references: torch.Tensor | None = None
    start: torch.Tensor | None = None
    redraw: torch.Tensor | None = None
    uses: tuple[ReferenceUse, ...] = ()

    def seen(self, step: int, steps: int) -> Seen:
        """The references that a step looks at."""
        return tuple(
            (place, use.strength)
            for place, use in enumerate(self.uses)
            if acts(use.start, use.end, step, steps)
        )

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


class Conditioner:
    """Encodes the images that a request brings.

    Args:
        dtype: of the latents.
        side: width and height in pixels of what one image token stands for.
    """

    def __init__(self, vae: Autoencoder, dtype: torch.dtype, side: int) -> None:
        self._vae, self._dtype, self._side = vae, dtype, side
        self._device = next(vae.parameters()).device

    def layout(self, inputs: InputImages) -> tuple[tuple[int, int], ...]:
        """Rows and columns of tokens of each reference."""
        shapes = (pixels.shape for pixels in inputs.references)
        return tuple((s[0] // self._side, s[1] // self._side) for s in shapes)

    def encode(self, inputs: InputImages) -> Conditions:
        """The conditions of a request. Runs the autoencoder."""
        references = start = redraw = None
        if inputs.references:
            references = torch.cat([self.tokens(pixels) for pixels in inputs.references])
        if inputs.start is not None:
            start = self.tokens(inputs.start)
        if inputs.redraw is not None:
            marked = torch.tensor(inputs.redraw).to(self._device, self._dtype)
            # A token is drawn anew if any of its pixels is: a thin mask must not fall between.
            blocks = functional.max_pool2d(marked[None, None], self._side)
            redraw = pack(blocks)[0]
        return Conditions(references, start, redraw)

    @torch.inference_mode()
    def tokens(self, pixels: Pixels) -> torch.Tensor:
        """Packed, normalised latents of an image: [tokens, token channels]."""
        # A copy: arrays from Pillow are read-only, which torch does not like.
        image = torch.tensor(pixels).permute(2, 0, 1).unsqueeze(0)
        image = image.to(self._device, torch.float32) / 255
        scaled = (2.0 * image - 1.0).to(self._dtype)
        height, width = pixels.shape[:2]
        latents = self._vae.encode(scaled, tiled=height * width > TILE_ABOVE_PIXELS)
        statistics = self._vae.bn
        normal = normalize(
            patchify(latents),
            statistics.running_mean,
            statistics.running_var,
            self._vae.config.batch_norm_eps,
        )
        return pack(normal)[0].to(self._dtype)
