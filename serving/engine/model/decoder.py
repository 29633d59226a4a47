"""Latents to pixels, as diffusers' Flux2Pipeline and VaeImageProcessor do it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from calotype.serving.engine.model.autoencoder import Autoencoder
from calotype.serving.engine.model.latents import TokenGrid, denormalize, unpack, unpatchify

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels

TILE_ABOVE_PIXELS = 2048 * 2048
"""Larger images are decoded in tiles, which costs time and faint seams, but bounds memory."""


def pixels_per_token(vae: Autoencoder) -> int:
    """Side of the square of pixels that one image token stands for."""
    return 2 * vae.config.pixels_per_latent


class Decoder:
    """The VAE's decoder.

    Args:
        tile_above: pixels above which an image is decoded in tiles.
    """

    def __init__(self, vae: Autoencoder, tile_above: int = TILE_ABOVE_PIXELS) -> None:
        self.vae = vae
        self.pixels_per_token = pixels_per_token(vae)
        self._tile_above = tile_above

    def decode(self, tokens: torch.Tensor, grid: TokenGrid, *, tiles: bool = False) -> list[Pixels]:
        """Images, uint8 [height, width, 3], of packed latents [n, tokens, token_channels].

        Args:
            tiles: decode in tiles whatever the size.
        """
        return list(_rounded(self.decode_float(tokens, grid, tiles=tiles)))

    @torch.inference_mode()
    def decode_float(
        self, tokens: torch.Tensor, grid: TokenGrid, *, tiles: bool = False
    ) -> np.ndarray:
        """The same before rounding: float32 [n, height, width, 3] in 0..1."""
        latents = self._latents(tokens, grid)
        tiles = tiles or self._pixels(grid) > self._tile_above
        return _array(self.vae.decode(latents, tiled=tiles))

    @torch.inference_mode()
    def preview(self, tokens: torch.Tensor, grid: TokenGrid, max_side: int) -> Pixels:
        """One image, no side longer than ``max_side``, of latents [tokens, token_channels].

        Neighbouring latents are averaged before they are decoded: a sixteenth of the work for a
        quarter of the side, and about what the decoded image would look like made smaller.
        """
        latents = self._latents(tokens.unsqueeze(0), grid)
        side = self.pixels_per_token // 2
        longest = side * max(latents.shape[2:])
        shrink = math.ceil(longest / max(side, max_side))
        if shrink > 1:
            height, width = (max(1, length // shrink) for length in latents.shape[2:])
            latents = functional.adaptive_avg_pool2d(latents, (height, width))
        pixels: Pixels = _rounded(_array(self.vae.decode(latents)))[0]
        return pixels

    def _latents(self, tokens: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
        """What the VAE decodes, [n, latent channels, height / 8, width / 8]."""
        statistics = self.vae.bn
        latents = denormalize(
            unpack(tokens, grid),
            statistics.running_mean,
            statistics.running_var,
            self.vae.config.batch_norm_eps,
        )
        return unpatchify(latents)

    def _pixels(self, grid: TokenGrid) -> int:
        return grid.tokens * self.pixels_per_token**2


def _array(images: torch.Tensor) -> np.ndarray:
    """The VAE's output as float32 [n, height, width, 3] in 0..1."""
    scaled = (images * 0.5 + 0.5).clamp(0, 1)
    array: np.ndarray = scaled.permute(0, 2, 3, 1).float().cpu().numpy()
    return array


def _rounded(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.round(images * 255).astype(np.uint8))
