"""Latents to pixels, as diffusers' Flux2Pipeline and VaeImageProcessor do it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from calotype.serving.engine.latents import TokenGrid, denormalize, unpack, unpatchify

if TYPE_CHECKING:
    from calotype.serving.request import Pixels

_ROWS_PIXELS = 512 * 512
"""Pictures are decoded together up to this many pixels in all: small ones are faster so, large
ones would only cost memory (about 4 GB for a picture of 1024x1024 in bfloat16)."""


def pixels_per_token(vae: Any) -> int:
    """Side of the square of pixels that one image token stands for."""
    halvings: int = len(vae.config.block_out_channels) - 1
    return 2 * 2**halvings


class Decoder:
    """The VAE's decoder.

    Args:
        vae: diffusers' AutoencoderKLFlux2.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.pixels_per_token = pixels_per_token(vae)

    def rows_at_once(self, grid: TokenGrid) -> int:
        """How many pictures of a size `decode` may be given together."""
        return max(1, _ROWS_PIXELS // (grid.tokens * self.pixels_per_token**2))

    def decode(self, tokens: torch.Tensor, grid: TokenGrid) -> list[Pixels]:
        """Pictures, uint8 [height, width, 3], of packed latents [n, tokens, token_channels]."""
        pictures = np.round(self.decode_float(tokens, grid) * 255).astype(np.uint8)
        return list(pictures)

    @torch.inference_mode()
    def decode_float(self, tokens: torch.Tensor, grid: TokenGrid) -> np.ndarray:
        """The same before rounding: float32 [n, height, width, 3] in 0..1."""
        statistics = self.vae.bn
        latents = denormalize(
            unpack(tokens, grid),
            statistics.running_mean,
            statistics.running_var,
            self.vae.config.batch_norm_eps,
        )
        pictures = self.vae.decode(unpatchify(latents), return_dict=False)[0]
        pictures = (pictures * 0.5 + 0.5).clamp(0, 1)
        array: np.ndarray = pictures.permute(0, 2, 3, 1).float().cpu().numpy()
        return array
