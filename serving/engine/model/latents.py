"""Shapes, position ids and normalisation of FLUX.2 latents.

Free functions over tensors, equal to the static methods of diffusers' Flux2Pipeline. Words:
*latents* are [channels, height / 8, width / 8] for the VAE; 2 x 2 of their pixels, side by side in
4 x channels, are one *token* of the denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """Rows and columns of image tokens."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[n, token_channels, rows, columns] to [n, tokens, token_channels]."""
    return latents.flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """[n, tokens, token_channels] to [n, token_channels, rows, columns]."""
    n, _, channels = tokens.shape
    return tokens.transpose(1, 2).reshape(n, channels, grid.rows, grid.columns)


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """[n, channels, h, w] to [n, 4 x channels, h / 2, w / 2], ordered (channel, row, column)."""
    n, channels, height, width = latents.shape
    blocks = latents.view(n, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * channels, height // 2, width // 2)


def unpatchify(latents: torch.Tensor) -> torch.Tensor:
    """[n, 4 x channels, rows, columns] to [n, channels, 2 x rows, 2 x columns]."""
    n, channels, rows, columns = latents.shape
    blocks = latents.reshape(n, channels // 4, 2, 2, rows, columns)
    return blocks.permute(0, 1, 4, 2, 5, 3).reshape(n, channels // 4, 2 * rows, 2 * columns)


def image_ids(grid: TokenGrid, time: int = 0) -> torch.Tensor:
    """(time, row, column, 0) of every image token: int64 [tokens, 4].

    Args:
        time: 0 for the image that is drawn, 10, 20, ... for reference images.
    """
    zero = torch.zeros(1, dtype=torch.int64)
    place = torch.arange(grid.rows), torch.arange(grid.columns)
    return torch.cartesian_prod(torch.tensor([time]), *place, zero)


def text_ids(length: int) -> torch.Tensor:
    """(0, 0, 0, place) of every text token: int64 [length, 4]."""
    zero = torch.zeros(1, dtype=torch.int64)
    return torch.cartesian_prod(zero, zero, zero, torch.arange(length))


def denormalize(
    latents: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, eps: float
) -> torch.Tensor:
    """Undoes `normalize`: what the VAE's decoder expects."""
    scale = torch.sqrt(variance.view(1, -1, 1, 1) + eps).to(latents.device, latents.dtype)
    return latents * scale + mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)


def normalize(
    latents: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, eps: float
) -> torch.Tensor:
    """Patchified latents [n, 4 x channels, rows, columns] by the statistics of ``vae.bn``."""
    scale = torch.sqrt(variance.view(1, -1, 1, 1) + eps).to(latents.device, latents.dtype)
    return (latents - mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)) / scale
